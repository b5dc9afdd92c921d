"""Capturing calibration data from recordings, and completing what a robot captured."""
