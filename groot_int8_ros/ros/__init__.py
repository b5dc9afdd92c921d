"""ROS messages to numpy and back, parameters, diagnostics. The only part that knows ROS types."""
