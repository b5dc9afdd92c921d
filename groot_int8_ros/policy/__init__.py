"""The policy without ROS: observation in, action chunk out.

Must not import rclpy, torch or transformers; a test holds it to that.
"""
