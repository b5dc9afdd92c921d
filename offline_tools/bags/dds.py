"""What Fast DDS needs in order not to lose camera frames between processes.

Owns: the one value of its transport setting that the tools, the tests and the help text use;
`config/policy.yaml` and README.md repeat it, and a test compares them.
"""

from __future__ import annotations

TRANSPORTS_VARIABLE = "FASTDDS_BUILTIN_TRANSPORTS"
# With LOCALHOST rmw_fastrtps sets transports of its own, and those of the variable above are not
# used: docs/dds.md has the figures.
RANGE_VARIABLE = "ROS_AUTOMATIC_DISCOVERY_RANGE"
LARGE_IMAGE_TRANSPORTS = (
    "LARGE_DATA?max_msg_size=4MB&sockets_size=4MB&non_blocking=true&tcp_negotiation_timeout=50"
)
