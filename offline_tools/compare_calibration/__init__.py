"""Calibration sets against each other: how many samples it takes, and what bad ones cost."""
