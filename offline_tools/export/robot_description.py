"""The robot description of a bundle: given by the user, read from the dataset, and checked.

Owns: merging `--robot` and `--dataset` against what the checkpoint's processor files need. Must
not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.robot import RobotDescription, load_robot
from groot_int8_ros.policy.types import CameraSpec, JointSpec
from offline_tools.dataset.lerobot import LeRobotDataset, Modality


def describe_robot(
    processor: Processor, robot_file: Path | None, dataset: Path | None
) -> RobotDescription:
    """Return the robot that a checkpoint's embodiment is exported for.

    What the robot file says comes first. Camera sizes, joint names and the action period that it
    leaves out come from the dataset; joints that neither names are called `<key>_<index>`, to be
    mapped in the node's parameters. An action key takes the joints of the state key of its name.

    Args:
        processor: The embodiment.
        robot_file: YAML in the form of `groot_int8_ros.policy.robot`, or None.
        dataset: LeRobot v2.1 dataset, or None.

    Raises:
        ConfigurationError: Neither source gives a camera's size or the action period, the robot
            file names a camera or key that the checkpoint lacks, or a joint list does not have the
            width of its key.
        DatasetError: The dataset cannot be read.
    """
    given = load_robot(robot_file) if robot_file else None
    recorded = _from_dataset(processor, dataset) if dataset else None
    if given is not None:
        _refuse_unused(processor, given, str(robot_file))
    sources = [source for source in (given, recorded) if source is not None]
    if not sources:
        raise ConfigurationError(
            "the checkpoint does not say how large the camera frames are and at which rate "
            "actions follow each other: pass --dataset with the training data, or --robot with a "
            "YAML file in the form that groot_int8_ros/policy/robot.py describes"
        )
    cameras = _cameras(processor, sources)
    state_widths = {key.key: key.dim for key in processor.state_keys}
    action_widths = {key.key: key.dim for key in processor.action_keys}
    state_joints = _joints(state_widths, [source.state_joints for source in sources], "state")
    action_joints = _joints(
        action_widths,
        [
            *(source.action_joints for source in sources),
            {key: joints for key, joints in state_joints.items() if key in action_widths},
        ],
        "action",
    )
    return RobotDescription(
        cameras=cameras,
        state_joints=state_joints,
        action_joints=action_joints,
        action_period_s=sources[0].action_period_s,
    )


def _refuse_unused(processor: Processor, robot: RobotDescription, source: str) -> None:
    # A misspelt name would silently leave that camera or mapping to the dataset or the defaults.
    for what, given, known in (
        ("cameras", [camera.key for camera in robot.cameras], processor.cameras),
        ("state_joints", robot.state_joints, [key.key for key in processor.state_keys]),
        ("action_joints", robot.action_joints, [key.key for key in processor.action_keys]),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigurationError(
                f"{source}: the checkpoint has no {what}.{unknown[0]}; it has {', '.join(known)}"
            )


def _from_dataset(processor: Processor, path: Path) -> RobotDescription:
    dataset = LeRobotDataset.open(path)
    return RobotDescription(
        cameras=tuple(
            CameraSpec(key=key, height=camera.height, width=camera.width)
            for key, camera in dataset.cameras.items()
        ),
        state_joints=_named_joints(dataset, "state", [key.key for key in processor.state_keys]),
        action_joints=_named_joints(dataset, "action", [key.key for key in processor.action_keys]),
        action_period_s=1.0 / dataset.fps,
    )


def _named_joints(
    dataset: LeRobotDataset, modality: Modality, keys: list[str]
) -> dict[str, tuple[JointSpec, ...]]:
    recorded = dataset.keys(modality)
    named = {key: dataset.joint_names(modality, key) for key in keys if key in recorded}
    return {
        key: tuple(JointSpec(name=name) for name in names)
        for key, names in named.items()
        if names is not None
    }


def _cameras(processor: Processor, sources: list[RobotDescription]) -> tuple[CameraSpec, ...]:
    cameras = []
    for key in processor.cameras:
        for source in sources:
            found = {camera.key: camera for camera in source.cameras}
            if key in found:
                cameras.append(found[key])
                break
        else:
            raise ConfigurationError(
                f"the checkpoint sees through a camera {key!r}, and neither --robot nor --dataset "
                f"gives its size; they know {sorted({c.key for s in sources for c in s.cameras})}"
            )
    return tuple(cameras)


def _joints(
    widths: Mapping[str, int],
    sources: list[Mapping[str, tuple[JointSpec, ...]]],
    modality: str,
) -> dict[str, tuple[JointSpec, ...]]:
    chosen = {}
    for key, width in widths.items():
        joints = next((source[key] for source in sources if key in source), None)
        if joints is None:
            joints = tuple(JointSpec(name=f"{key}_{index}") for index in range(width))
        if len(joints) != width:
            raise ConfigurationError(
                f"the {modality} key {key!r} has {width} dimensions in the checkpoint's "
                f"statistics, but {len(joints)} joints are given for it"
            )
        chosen[key] = joints
    return chosen
