"""`groot-int8 simulate`: the simulated robot as a ROS 2 process, in real time or stepped.

Owns: the subcommand: when episodes begin, and what is written of them. Must not import torch, and
imports rclpy only when it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.types import UInt8Array
from offline_tools.arguments import not_negative_float, positive_float, positive_int, seed
from offline_tools.bags.play_bag import StopSignals
from offline_tools.simulation.film import film_strip
from offline_tools.simulation.tasks import parse_task, task_of

_SIGNALLED = 128
_NO_NODE = 1
# The policy's 5 Hz: in real time it takes the newest picture, where time is stepped every one.
_STEPPED_CAMERA_STEPS = 10
# Of a stepped clock with an inference or a control period.
_PATIENCE_S = 60.0
_ASK_AGAIN_S = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The nodes need use_sim_time and config/simulated_arm_node.yaml; docs/closed_loop.md has\n"
        "the commands. Topics: /clock, joint_states, cameras/*/image_raw, instruction,\n"
        "simulated_robot/result; commands from /arm_controller/joint_trajectory and\n"
        "/gripper_controller/commands."
    )
    parser.add_argument("--episodes", type=positive_int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--first-seed", type=seed, default=0, help="of the scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--task", metavar="CUBE/PLATE", help="of every episode (default: follows from the seed)"
    )
    parser.add_argument(
        "--limit-s", type=positive_float, default=15.0, help="of an episode (default: %(default)s)"
    )
    parser.add_argument(
        "--wait-s",
        type=not_negative_float,
        default=60.0,
        help="wait this long for the first command; 0 does not wait (default: %(default)s)",
    )
    parser.add_argument(
        "--stepped",
        action="store_true",
        help="let time stand until the policy and the executor have answered",
    )
    parser.add_argument(
        "--enable",
        action="store_true",
        help="call chunk_executor/enable, as a person would at a robot",
    )
    parser.add_argument("--output", type=Path, help="file of results, one JSON line an episode")
    parser.add_argument("--film", type=Path, help="picture of the first episode to write")


def _asking_to_enable(node: Any) -> Callable[[], None]:
    """Return what asks the executor, again until it says yes; called in the robot's loop."""
    from std_srvs.srv import Trigger

    client = node.create_client(Trigger, "chunk_executor/enable")
    answer: Any = None
    asked_s = 0.0

    def ask() -> None:
        nonlocal answer, asked_s
        is_done = answer is not None and answer.done()
        if is_done and answer.result().success:
            return
        # An answer may get lost while the two sides find each other.
        is_lost = time.monotonic() - asked_s > _ASK_AGAIN_S
        if client.service_is_ready() and (answer is None or is_done or is_lost):
            answer, asked_s = client.call_async(Trigger.Request()), time.monotonic()

    return ask


def run(args: argparse.Namespace) -> int:
    """Run the episodes; 1 if nobody commands the arm, 128 plus the signal if ended by one."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from offline_tools.simulation.environment import Tabletop
    from offline_tools.simulation.live_robot import LiveRobot

    fixed = parse_task(args.task) if args.task else None
    if args.output:
        refuse_occupied(args.output)
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("simulated_robot", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    simulation = Tabletop()
    simulation.reset(args.first_seed)
    results = []
    try:
        with StopSignals() as stop:
            pace: dict[str, Any] = (
                {"camera_steps": _STEPPED_CAMERA_STEPS, "patience_s": _PATIENCE_S}
                if args.stepped
                else {}
            )
            robot = LiveRobot(node, executor, simulation, start_ns=time.time_ns(), **pace)
            give_up_s = time.monotonic() + args.wait_s
            ask = _asking_to_enable(node) if args.enable else lambda: None

            def is_commanded() -> bool:
                ask()
                return robot.commands > 0 or time.monotonic() >= give_up_s

            waited = robot.idle(stop.wait_until, is_commanded)
            if waited and args.wait_s and not robot.commands:
                print("no command arrived: is chunk_executor active and enabled?", flush=True)
                return _NO_NODE
            for number in range(args.first_seed, args.first_seed + args.episodes):
                task = fixed or task_of(number)
                film: list[Mapping[str, UInt8Array]] = []
                filmed = args.film is not None and number == args.first_seed
                result = robot.episode(
                    number,
                    task,
                    limit_s=args.limit_s,
                    go_on=stop.wait_until,
                    on_frames=film.append if filmed else None,
                )
                if result is None:
                    break
                if film:
                    film_strip(film).save(args.film)
                results.append(result)
                line = json.dumps(asdict(result))
                robot.publish_result(line)
                if args.output:
                    with args.output.open("a", encoding="utf-8") as stream:
                        stream.write(line + "\n")
                print(
                    f"episode {number}: {task.instruction} "
                    f"{'done' if result.success else 'not done'} in {result.time_s:.1f} s, "
                    f"{result.commands} commands, tracking error {result.tracking_error_rad:.3f} "
                    f"rad, {result.wall_s:.1f} s of real time",
                    flush=True,
                )
            successes = sum(result.success for result in results)
            print(f"{successes} of {len(results)} episodes done", flush=True)
            return 0 if stop.received is None else _SIGNALLED + stop.received
    finally:
        simulation.close()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
