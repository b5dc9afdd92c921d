"""`groot-int8 doctor`: what is wrong with a running system, seen from outside.

Owns: the checks of machine, bundle, topics and nodes. Must not import torch; rclpy is imported by
`system` alone, so that everything else is checked where there is no ROS.
"""
