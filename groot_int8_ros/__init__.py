"""The robot side: a GR00T N1.6 policy as ROS 2 nodes, free of torch and transformers."""

__version__ = "0.1.0"
