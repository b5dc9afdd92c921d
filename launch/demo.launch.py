"""Starts policy node, chunk executor and the simulated robot, which does some episodes.

Owns: the launch arguments, and when the launch ends: with the robot's last episode, or with the
executor. The bundle is one of the simulated robot's (docs/closed_loop.md); this package's extra
`sim` has to be there. Without a bundle the launch is `make demo` on a machine with ROS 2: the
bundles are made first, in float and in INT8, and the page of results afterwards. Nothing has to
be enabled by hand: the robot is simulated, and asks for it itself.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import sys

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare

# Longer than the executor needs to stop the robot (stop_timeout_s).
_STOP_TIMEOUT_S = "10"


def _config(name: str) -> PathJoinSubstitution:
    return PathJoinSubstitution([FindPackageShare("groot_int8_ros"), "config", name])


def _start(context: LaunchContext) -> list[object]:
    def given(name: str) -> str:
        return str(LaunchConfiguration(name).perform(context))

    if not given("bundle"):
        # It makes the bundles, and starts both nodes and the robot with each, stepped.
        whole = _tool(
            "demonstration",
            *("demo", "--output", given("output") or "demo_output"),
            *("--episodes", given("episodes")),
        )
        ends = OnProcessExit(target_action=whole, on_exit=_end("the demonstration"))
        return [RegisterEventHandler(ends), whole]
    stepped = given("stepped").lower()
    if stepped not in ("true", "false"):
        raise ValueError(f"launch argument 'stepped' must be true or false, not {stepped!r}")
    parameters: list[object] = [ParameterFile(LaunchConfiguration("params_file"))]
    if stepped == "true":
        parameters.append(ParameterFile(_config("simulated_arm_stepped.yaml")))
    nodes = [
        LifecycleNode(
            package="groot_int8_ros",
            executable=executable,
            name=name,
            namespace="",
            parameters=[*parameters, own],
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            output="both",
            sigterm_timeout=_STOP_TIMEOUT_S,
            sigkill_timeout=_STOP_TIMEOUT_S,
        )
        for name, executable, own in (
            ("chunk_executor", "chunk_executor_node", {}),
            ("policy_node", "policy_node", {"bundle": given("bundle")}),
        )
    ]
    robot = _tool(
        "simulated_robot",
        *("simulate", "--enable"),
        *("--episodes", given("episodes"), "--first-seed", given("first_seed")),
        *(["--stepped"] if stepped == "true" else []),
        *(["--output", given("output")] if given("output") else []),
        *(["--film", given("film")] if given("film") else []),
    )
    return [
        RegisterEventHandler(OnProcessExit(target_action=robot, on_exit=_end("the robot"))),
        RegisterEventHandler(OnProcessExit(target_action=nodes[0], on_exit=_end("the executor"))),
        *nodes,
        robot,
    ]


def _tool(name: str, *words: str) -> ExecuteProcess:
    """Return a process that runs `groot-int8` with these words."""
    return ExecuteProcess(
        cmd=[sys.executable, "-m", "offline_tools.cli", *words],
        name=name,
        output="both",
        sigterm_timeout=_STOP_TIMEOUT_S,
        sigkill_timeout=_STOP_TIMEOUT_S,
    )


def _end(who: str) -> object:
    def shut_down(_: object, context: LaunchContext) -> list[object]:
        # launch_ros fails on a second shutdown, and Ctrl-C may have asked for the first.
        if context.is_shutdown:
            return []
        return [EmitEvent(event=Shutdown(reason=f"{who} has ended"))]

    return shut_down


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "bundle",
                default_value="",
                description="Folder of a bundle of the simulated robot; without it, make demo.",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=_config("simulated_arm_node.yaml"),
                description="YAML file with sections /**/policy_node and /**/chunk_executor.",
            ),
            DeclareLaunchArgument(
                "stepped",
                default_value="false",
                description="Let time stand until the nodes have answered; false is real time.",
            ),
            DeclareLaunchArgument(
                "episodes", default_value="10", description="How many episodes there are."
            ),
            DeclareLaunchArgument(
                "first_seed", default_value="0", description="Seed of the first scene."
            ),
            DeclareLaunchArgument(
                "output",
                default_value="",
                description="File of results to write, if any; the folder without a bundle.",
            ),
            DeclareLaunchArgument(
                "film", default_value="", description="Picture of the first episode, if any."
            ),
            DeclareLaunchArgument(
                "log_level", default_value="info", description="debug, info, warn, error or fatal."
            ),
            OpaqueFunction(function=_start),
        ]
    )
