"""`groot-int8 executor-params`: a parameter file for the chunk executor, from a bundle.

Owns: which joints, horizon and statistics of a bundle become which parameters. Must not import
torch, ROS or an engine. What a bundle knows is joint names, units and what the training set held;
what only the robot knows (topics, limits) is asked for or left to be filled in. The executor reads
no bundle, so that it shares nothing with the policy but topics.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from groot_int8_ros.control.types import Float64Array
from groot_int8_ros.control.urdf import urdf_limits
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.files import atomic_file
from groot_int8_ros.policy.processor import ActionKey, StateKey
from groot_int8_ros.policy.robot import policy_to_joint
from groot_int8_ros.policy.types import JointSpec
from offline_tools.arguments import positive_float

# Where the training set is described by mean and deviation, this many deviations are its range.
_DEVIATIONS = 4.0
# Statistics may be percentiles, beyond which good values lie.
_MARGIN = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle that the policy node will run")
    add("--output", type=Path, required=True, help="YAML file to write")
    add("--urdf", type=Path, help="URDF with limits of all joints")
    add(
        "--velocity",
        type=positive_float,
        metavar="V",
        help="velocity limit of every joint, rad/s (required without --urdf)",
    )
    add(
        "--acceleration",
        type=positive_float,
        default=10.0,
        metavar="A",
        help="acceleration limit of every joint, rad/s² (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    if args.urdf is None and args.velocity is None:
        raise ConfigurationError(
            "the executor needs a velocity limit for each joint: give --velocity, or a --urdf"
        )
    bundle = open_bundle(args.bundle, verify_hashes=False)
    content = parameters(bundle, args.urdf, args.velocity, args.acceleration)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=95)
    with atomic_file(args.output) as partial:
        partial.write_text(_HEAD + text, encoding="utf-8")
    channels = content["/**/chunk_executor"]["ros__parameters"]["channel"]
    print(f"{args.output}: {len(channels)} channels ({', '.join(channels)}).")
    print("Now correct in it: topic and output of each channel, and its limits.")
    return 0


def parameters(
    bundle: Bundle, urdf: Path | None, velocity: float | None, acceleration: float
) -> dict[str, Any]:
    """Return the executor's parameters as the YAML has them.

    Args:
        bundle: The policy's.
        urdf: Limits of the joints, or None.
        velocity: Velocity limit of every joint, unit/s, or None for the URDF's.
        acceleration: Acceleration limit of every joint, unit/s².

    Raises:
        ConfigurationError: The URDF lacks a joint.
    """
    robot, processor = bundle.manifest.robot, bundle.processor
    states = {key.key: key for key in processor.state_keys}
    channels: dict[str, Any] = {}
    for key in processor.action_keys:
        joints = robot.action_joints[key.key]
        names = [joint.name for joint in joints]
        low, high = _range(key, states, joints)
        channel: dict[str, Any] = {
            "joints": names,
            "output": "joint_trajectory",
            "topic": f"/{key.key}_controller/joint_trajectory",
            "acceleration": [acceleration],
            "statistics_low": low.tolist(),
            "statistics_high": high.tolist(),
        }
        if velocity is not None:
            channel["velocity"] = [velocity]
        if urdf is not None:
            urdf_limits(urdf, names)
        channels[key.key] = channel
    values: dict[str, Any] = {
        "chunk_topic": "policy_node/action_chunk",
        "joint_state_topic": "joint_states",
        "statistics_margin": _MARGIN,
        "channels": list(channels),
        "channel": channels,
    }
    if urdf is not None:
        values = {"urdf": str(urdf.resolve()), **values}
    return {"/**/chunk_executor": {"ros__parameters": values}}


def _range(
    key: ActionKey, states: dict[str, StateKey], joints: tuple[JointSpec, ...]
) -> tuple[Float64Array, Float64Array]:
    """Return what the training set held of a key's targets, in the units of `JointState`."""
    # The statistics of a relative key are those of differences; where the joints were tells then.
    source = states[key.reference_state_key] if key.reference_state_key else key
    unknown = np.full(len(joints), math.inf)
    if source.low is not None and source.high is not None:
        ends = np.stack([np.atleast_2d(source.low).min(0), np.atleast_2d(source.high).max(0)])
    elif source.mean is not None and source.std is not None:
        mean, spread = np.atleast_2d(source.mean), _DEVIATIONS * np.atleast_2d(source.std)
        ends = np.stack([(mean - spread).min(0), (mean + spread).max(0)])
    else:
        return -unknown, unknown
    if ends.shape[1] != len(joints):
        return -unknown, unknown
    positions = policy_to_joint(joints, ends.astype(np.float64))
    # A negative sign turns a joint's range around.
    return positions.min(axis=0), positions.max(axis=0)


_HEAD = """\
# Parameters of chunk_executor_node, begun from a bundle by `groot-int8 executor-params`.
# config/chunk_executor.yaml lists all of them. statistics_* are what the training set held, in
# the units of JointState.
"""
