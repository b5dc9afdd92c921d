"""Starts policy node and chunk executor of one robot, each in its own process.

Owns: the launch arguments, and what the end of one process means for the other. The policy's end,
however it comes, leaves the executor running: it holds. The policy is started again, unless
`respawn` says otherwise. The executor's end ends the launch. The YAML has a section for each node
and is the source of truth; an argument that is left out changes nothing in it.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterFile

# Longer than the executor needs to stop the robot (stop_timeout_s).
_STOP_TIMEOUT_S = "10"
_RESPAWN_DELAY_S = 2.0


def _boolean(context: LaunchContext, name: str) -> bool | None:
    text = LaunchConfiguration(name).perform(context).lower()
    if text not in ("", "true", "false"):
        raise ValueError(f"launch argument '{name}' must be true or false, not {text!r}")
    return text == "true" if text else None


def _start(context: LaunchContext) -> list[object]:
    overrides = {
        name: value
        for name in ("use_sim_time", "autostart")
        if (value := _boolean(context, name)) is not None
    }
    bundle = LaunchConfiguration("bundle").perform(context)
    own = {"policy_node": {"bundle": bundle} if bundle else {}, "chunk_executor": {}}
    nodes = {
        name: LifecycleNode(
            package="groot_int8_ros",
            executable=executable,
            name=name,
            namespace=LaunchConfiguration("namespace"),
            parameters=[
                ParameterFile(LaunchConfiguration("params_file")),
                overrides | own[name],
            ],
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            output="both",
            sigterm_timeout=_STOP_TIMEOUT_S,
            sigkill_timeout=_STOP_TIMEOUT_S,
            respawn=name == "policy_node" and bool(_boolean(context, "respawn")),
            respawn_delay=_RESPAWN_DELAY_S,
        )
        for name, executable in (
            ("chunk_executor", "chunk_executor_node"),
            ("policy_node", "policy_node"),
        )
    }
    executor = nodes["chunk_executor"]
    return [
        RegisterEventHandler(OnProcessExit(target_action=executor, on_exit=_end)),
        *nodes.values(),
    ]


def _end(_: object, context: LaunchContext) -> list[object]:
    # launch_ros fails on a second shutdown, and Ctrl-C has already asked for the first.
    if context.is_shutdown:
        return []
    return [EmitEvent(event=Shutdown(reason="chunk_executor has exited"))]


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of both nodes."
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="false",
                description="Take the time from /clock, as when a bag is played.",
            ),
            DeclareLaunchArgument(
                "params_file",
                description="YAML file with sections /**/policy_node and /**/chunk_executor, such "
                "as config/so101.yaml.",
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="true",
                description="Configure and activate both nodes; the executor stays disabled.",
            ),
            DeclareLaunchArgument(
                "respawn", default_value="true", description="Start a policy that died again."
            ),
            DeclareLaunchArgument(
                "log_level", default_value="info", description="debug, info, warn, error or fatal."
            ),
            DeclareLaunchArgument(
                "bundle",
                default_value="",
                description="Folder of the bundle; replaces the one in params_file.",
            ),
            OpaqueFunction(function=_start),
        ]
    )
