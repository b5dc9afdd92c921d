#!/bin/bash
# Runs a command with ROS 2 and this package in reach, in the container and from the systemd units.
# Exec, so that SIGTERM reaches the node itself: it stops the robot first.
set -eo pipefail
# ROS's own setup files use variables that are not set.
source "/opt/ros/${ROS_DISTRO:-humble}/setup.bash"
# A workspace of the robot's own messages and drivers, where there is one.
if [[ -n "${GROOT_WORKSPACE:-}" ]]; then
    source "${GROOT_WORKSPACE}/install/setup.bash"
fi
export PATH="${GROOT_ENVIRONMENT:-/opt/groot}/bin:${PATH}"
# Keeps large images whole between processes: docs/dds.md. Drivers need the same.
export FASTDDS_BUILTIN_TRANSPORTS="${FASTDDS_BUILTIN_TRANSPORTS:-LARGE_DATA?max_msg_size=4MB&sockets_size=4MB&non_blocking=true&tcp_negotiation_timeout=50}"
exec "$@"
