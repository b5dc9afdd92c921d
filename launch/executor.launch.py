"""Starts the chunk executor.

Owns: the launch arguments. The node's YAML is the source of truth for everything else; an
argument that is left out changes nothing in it. The node comes up active and disabled: it commands
nothing until `~/enable` is called.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare


def _start(context: LaunchContext) -> list[object]:
    overrides: dict[str, object] = {}
    for name in ("use_sim_time", "autostart"):
        text = LaunchConfiguration(name).perform(context).lower()
        if text not in ("", "true", "false"):
            raise ValueError(f"launch argument '{name}' must be true or false, not {text!r}")
        if text:
            overrides[name] = text == "true"

    node = LifecycleNode(
        package="groot_int8_ros",
        executable="chunk_executor_node",
        name="chunk_executor",
        namespace=LaunchConfiguration("namespace"),
        parameters=[ParameterFile(LaunchConfiguration("params_file")), overrides],
        arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
        output="both",
        # Stopping the robot takes up to the node's stop_timeout_s; launch must not be faster.
        sigterm_timeout="10",
        sigkill_timeout="10",
    )
    # Without its only node the launch has nothing left to do, and whoever started it should know.
    return [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=_end)), node]


def _end(_: object, context: LaunchContext) -> list[object]:
    # launch_ros fails on a second shutdown, and Ctrl-C has already asked for the first.
    if context.is_shutdown:
        return []
    return [EmitEvent(event=Shutdown(reason="chunk_executor has exited"))]


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    default_parameters = PathJoinSubstitution(
        [FindPackageShare("groot_int8_ros"), "config", "chunk_executor.yaml"]
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of the node."
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="false",
                description="Take the time from /clock, as when a bag is played.",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=default_parameters,
                description="YAML file with the node's parameters.",
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="true",
                description="Configure and activate the node at start; it stays disabled.",
            ),
            DeclareLaunchArgument(
                "log_level", default_value="info", description="debug, info, warn, error or fatal."
            ),
            OpaqueFunction(function=_start),
        ]
    )
