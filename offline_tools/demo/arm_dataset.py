"""A generated dataset: a six-joint arm that reaches, with two rendered cameras.

Owns: motion and pictures of the generated episodes. Must not import torch. The joints are those
of an SO-101 in degrees; the cameras show the arm's own pose, so image and joints belong together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.types import Float32Array, Float64Array, UInt8Array
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset

JOINTS = {
    "single_arm": ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"),
    "gripper": ("gripper",),
}
CAMERAS = {"front": (480, 640), "wrist": (480, 640)}
# Cameras of a larger robot are further views of the same arm, in this order.
CAMERA_ORDER = ("front", "wrist", "front_mirrored", "wrist_mirrored")
FPS = 30.0
INSTRUCTION = "Put the red cube into the green bowl."

_LOW = np.array([-60.0, -90.0, -80.0, -20.0, -45.0, 2.0])
_HIGH = np.array([60.0, 40.0, 90.0, 80.0, 45.0, 60.0])
_WAYPOINT_FRAMES = 40
_LINK_PIXELS = (150, 120, 70)
# A real arm follows its targets late; the recorded state lags the command by this many frames.
_LAG_FRAMES = 3


def write_arm_dataset(
    folder: Path,
    *,
    episodes: int,
    frames: int,
    seed: int,
    cameras: Mapping[str, tuple[int, int]] = CAMERAS,
) -> None:
    """Write generated episodes as a LeRobot v2.1 dataset.

    Args:
        folder: The dataset's folder; replaced if it is there.
        episodes: Number of episodes.
        frames: Frames of each.
        seed: Seed of motion and scene.
        cameras: Some of `CAMERA_ORDER` with height and width of their frames in pixels.

    Raises:
        ConfigurationError: No episode or no frame is asked for.
        OutputError: The folder cannot be written.
    """
    if episodes < 1 or frames < 1:
        raise ConfigurationError(
            f"a dataset needs at least one episode of at least one frame, not {episodes} of "
            f"{frames}"
        )
    write_dataset(
        folder,
        (
            _episode(np.random.RandomState([seed, index]), frames, cameras)
            for index in range(episodes)
        ),
        fps=FPS,
        state_joints=JOINTS,
        action_joints=JOINTS,
        cameras=cameras,
        robot_type="generated_arm",
    )


def _episode(
    random: np.random.RandomState, frames: int, cameras: Mapping[str, tuple[int, int]]
) -> NewEpisode:
    target = _motion(random, frames + _LAG_FRAMES)
    state = target[:frames] + random.normal(0.0, 0.05, (frames, len(_LOW)))
    command = target[_LAG_FRAMES:]
    cube = random.uniform((150, 330), (490, 430))
    return NewEpisode(
        state=_by_key(state),
        action=_by_key(command),
        frames={key: _views(key, size, state, cube) for key, size in cameras.items()},
        instructions=INSTRUCTION,
    )


def _motion(random: np.random.RandomState, frames: int) -> Float64Array:
    """Return joint targets through random waypoints with minimum-jerk segments, (frames, 6)."""
    count = frames // _WAYPOINT_FRAMES + 2
    waypoints = random.uniform(_LOW, _HIGH, (count, len(_LOW)))
    time = np.arange(frames) / _WAYPOINT_FRAMES
    segment = time.astype(int)
    phase = (time - segment)[:, None]
    # Minimum jerk between two rests: Flash and Hogan 1985, J. Neuroscience 5(7).
    blend = phase**3 * (10 - 15 * phase + 6 * phase**2)
    motion: Float64Array = waypoints[segment] * (1 - blend) + waypoints[segment + 1] * blend
    return motion


def _by_key(values: Float64Array) -> dict[str, Float32Array]:
    split = np.split(values.astype(np.float32), [len(JOINTS["single_arm"])], axis=1)
    return dict(zip(JOINTS, split, strict=True))


def _background(colour: tuple[int, int, int]) -> UInt8Array:
    height, width = CAMERAS["front"]
    shade = np.linspace(0.6, 1.0, height)[:, None, None]
    return np.broadcast_to(shade * np.array(colour), (height, width, 3)).astype(np.uint8).copy()


def _views(
    key: str, size: tuple[int, int], states: Float64Array, cube: Float64Array
) -> Iterator[UInt8Array]:
    draw = _front if key.startswith("front") else _wrist
    for pose in states:
        image = draw(pose, cube)
        if key.endswith("mirrored"):
            image = image[:, ::-1]
        if image.shape[:2] != size:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8)
        yield np.ascontiguousarray(image)


def _front(pose: Float64Array, cube: Float64Array) -> UInt8Array:
    image = _background((190, 200, 210))
    x, y = (int(value) for value in cube)
    cv2.rectangle(image, (x - 18, y - 18), (x + 18, y + 18), (200, 30, 30), -1)
    cv2.ellipse(image, (480, 420), (60, 25), 0, 0, 360, (30, 150, 60), -1)
    point = np.array([320.0 + pose[0] * 2.0, 470.0])
    angle = -90.0
    for length, bend in zip(_LINK_PIXELS, pose[1:4], strict=True):
        angle += bend * 0.5
        end = point + length * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        cv2.line(image, _pixel(point), _pixel(end), (60, 60, 70), 18, cv2.LINE_AA)
        point = end
    opening = 6 + pose[5] * 0.4
    for side in (-1.0, 1.0):
        tip = point + np.array([side * opening, 25.0])
        cv2.line(image, _pixel(point), _pixel(tip), (20, 20, 20), 6, cv2.LINE_AA)
    return image


def _wrist(pose: Float64Array, cube: Float64Array) -> UInt8Array:
    image = _background((170, 160, 150))
    centre = np.array([320.0, 240.0]) + (cube - (320.0, 380.0)) * 0.8 - pose[:2] * 1.5
    rotation = cv2.boxPoints((tuple(map(float, centre)), (90.0, 90.0), float(pose[4])))
    cv2.fillPoly(image, [rotation.astype(np.int32)], (200, 30, 30), cv2.LINE_AA)
    opening = int(40 + pose[5] * 2)
    for side in (-1, 1):
        x = 320 + side * opening
        cv2.rectangle(image, (x - 15, 360), (x + 15, 479), (20, 20, 20), -1)
    return image


def _pixel(point: Float64Array) -> tuple[int, int]:
    return round(point[0]), round(point[1])
