"""Captured policy inputs: one store, written live on the robot and offline from recordings.

Owns: samples, their store, which samples to keep, the exchange format of the community, and the
report on what a set covers. Must not import ROS, torch or `offline_tools`: the recorder node, the
calibration step, the quantiser and the engine builder all read and write through it.
"""
