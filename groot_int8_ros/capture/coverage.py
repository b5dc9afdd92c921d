"""What a calibration set covers, and what it does not.

Owns: `Coverage` and the thresholds below which something is called thin. Must not import ROS or
an engine. A scale that was found on joint positions, light or a task that the robot then leaves is
a guess; the report names such gaps in words, for a person to judge.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.policy.bundle import Manifest
from groot_int8_ros.policy.files import atomic_file
from groot_int8_ros.policy.preprocess import task_text
from groot_int8_ros.policy.processor import Processor, StateKey
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import Float64Array

COVERAGE_FILE = "coverage.json"
COVERAGE_TABLE_FILE = "coverage.txt"

# Published INT8 ports of this model calibrate on 500 samples; entropy calibration fills histograms
# of thousands of values a tensor, which a few dozen observations do, and a handful do not.
MIN_SAMPLES = 32
# A joint that moved through less of its recorded range is called thin. Of the simulated arm's
# captures 32 visit 86 % of every joint's; 128 of the first second of each episode, before the arm
# has turned to a plate, visit 62 % (docs/closed_loop.md).
MIN_JOINT_RANGE = 0.7
# Samples that lie outside of the statistics, where the network sees clipped or unknown values.
MAX_OUTSIDE = 0.05
MIN_INSTRUCTION_SHARE = 0.02
# Grey levels of 0 to 255.
DARK, BRIGHT = 25.0, 230.0
MIN_CONTRAST = 8.0
MIN_BRIGHTNESS_RANGE = 10.0


@dataclass(frozen=True)
class JointCoverage:
    """One dimension of the state.

    Attributes:
        key: State key.
        joint: The robot's name of it.
        low: Lower end of the recorded range: the 1st percentile, or where the statistics lack it
            the minimum or mean - 2 deviations; None without any. A minimum may be one stray
            moment of the training data, which no set has to visit.
        high: Upper end, likewise.
        visited_low: Smallest value among the samples.
        visited_high: Largest.
        covered: Part of the recorded range that was visited, 0 to 1; None without a range.
        outside: Part of the samples that lie outside of what the encoding scales by: minimum to
            maximum, 1st to 99th percentile, or mean ± 2 deviations.
    """

    key: str
    joint: str
    low: float | None
    high: float | None
    visited_low: float
    visited_high: float
    covered: float | None
    outside: float


@dataclass(frozen=True)
class CameraCoverage:
    """The light one camera saw, in grey levels from 0 to 255.

    Attributes:
        camera: Its key, or its place where only network images are stored.
        brightness: Lowest, mean and highest mean of an image.
        contrast: Lowest, mean and highest standard deviation of an image.
    """

    camera: str
    brightness: tuple[float, float, float]
    contrast: tuple[float, float, float]


@dataclass(frozen=True)
class Coverage:
    """What a set covers.

    Attributes:
        samples: Number of samples.
        offered: Observations among which they were chosen.
        finished: Whether the recording ended as it should.
        content_sha256: Of the set.
        joints: Every dimension of the state.
        timesteps: Time bucket to how often the diffusion transformer ran in it.
        instructions: Instruction to number of samples, those of the bundle's bank among them.
        cameras: Every camera.
        thin: What there is too little of, in words.
    """

    samples: int
    offered: int
    finished: bool
    content_sha256: str
    joints: tuple[JointCoverage, ...]
    timesteps: Mapping[int, int]
    instructions: Mapping[str, int]
    cameras: tuple[CameraCoverage, ...]
    thin: tuple[str, ...]

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=2) + "\n"

    def to_text(self) -> str:
        """Return the report as a table for a terminal."""
        lines = [
            f"{self.samples} samples of {self.offered} offered"
            + ("" if self.finished else " (the recording did not end as it should)"),
            "",
            f"{'joint':32} {'statistics':>21} {'visited':>21} {'covered':>8} {'outside':>8}",
        ]
        lines += [
            f"{f'{joint.key}: {joint.joint}':32} {_range(joint.low, joint.high):>21} "
            f"{_range(joint.visited_low, joint.visited_high):>21} "
            f"{_percent(joint.covered):>8} {_percent(joint.outside):>8}"
            for joint in self.joints
        ]
        lines += ["", f"{'camera':32} {'brightness':>21} {'contrast':>21}   (least mean most)"]
        lines += [
            f"{camera.camera:32} {_triple(camera.brightness):>21} {_triple(camera.contrast):>21}"
            for camera in self.cameras
        ]
        lines += [
            "",
            "timesteps: " + (_counts(self.timesteps) or "none: the action head was not run"),
        ]
        lines += [f"instruction ({count}x): {text}" for text, count in self.instructions.items()]
        lines += ["", *(f"THIN: {text}" for text in self.thin)]
        if not self.thin:
            lines.append("nothing is thin")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `coverage.json` and `coverage.txt`.

        Raises:
            OutputError: The folder cannot be written.
        """
        advice = (
            f"The samples in {folder} are whole and can be used. Free space, then write what they "
            f"cover: groot-int8 calibration-data report {folder} --bundle BUNDLE"
        )
        for name, text in ((COVERAGE_FILE, self.to_json()), (COVERAGE_TABLE_FILE, self.to_text())):
            with atomic_file(folder / name, advice=advice) as temporary:
                temporary.write_text(text, encoding="utf-8")


def measure_coverage(store: CaptureStore, processor: Processor, manifest: Manifest) -> Coverage:
    """Read a store once and report on it.

    Args:
        store: The set.
        processor: Statistics of the state.
        manifest: The bundle's: names of the joints, and the flow's time buckets.

    Raises:
        CaptureError: A shard cannot be read.
    """
    states: dict[str, list[Any]] = {key.key: [] for key in processor.state_keys}
    light: dict[str, list[tuple[float, float]]] = {}
    timesteps: Counter[int] = Counter()
    instructions: Counter[str] = Counter()
    spelling = _spelling(processor, manifest)
    # What the robot may be told and no sample was is there, with none.
    instructions.update(dict.fromkeys(spelling.values(), 0))
    for sample in store.samples():
        told = task_text(sample.instruction, processor.formalize_language)
        instructions[spelling.get(told, sample.instruction)] += 1
        for key, values in states.items():
            if key in sample.state:
                values.append(sample.state[key])
        for camera, seen in _light(sample, processor.cameras).items():
            light.setdefault(camera, []).append(seen)
        if sample.dit is not None:
            timesteps.update(sample.dit.timestep.tolist())
        elif sample.features is not None:
            # The deployed head runs all of its steps for every sample.
            timesteps.update(manifest.timesteps)
    joints = tuple(
        joint
        for key in processor.state_keys
        if states[key.key]
        for joint in _joints(key, np.stack(states[key.key]).astype(np.float64), manifest.robot)
    )
    cameras = tuple(_camera(camera, seen) for camera, seen in light.items())
    return Coverage(
        samples=len(store),
        offered=store.index.offered,
        finished=store.index.finished,
        content_sha256=store.content_sha256,
        joints=joints,
        timesteps=dict(sorted(timesteps.items())),
        instructions=dict(instructions.most_common()),
        cameras=cameras,
        thin=tuple(_thin(len(store), joints, cameras, instructions, timesteps)),
    )


def _spelling(processor: Processor, manifest: Manifest) -> dict[str, str]:
    """Return the bundle's instructions, by what the policy is told."""
    bank = () if manifest.prompts is None else manifest.prompts.instructions
    return {task_text(record.text, processor.formalize_language): record.text for record in bank}


def _light(sample: CaptureSample, cameras: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return mean and deviation of each camera's image in grey levels."""
    if sample.images:
        images: dict[str, Any] = dict(sample.images)
    elif sample.backbone is not None:
        # The network's images are (v - 127.5) / 127.5, one a camera in the processor's order.
        pixels = sample.backbone.pixel_values.astype(np.float64) * 127.5 + 127.5
        images = dict(zip(cameras, pixels, strict=False))
    else:
        return {}
    return {key: (float(image.mean()), float(image.std())) for key, image in images.items()}


def _joints(key: StateKey, values: Float64Array, robot: RobotDescription) -> list[JointCoverage]:
    limits = _limits(key)
    usual = limits
    if key.usual_low is not None and key.usual_high is not None:
        usual = key.usual_low, key.usual_high
    found = []
    for index, joint in enumerate(robot.state_joints[key.key]):
        column = values[:, index]
        visited_low, visited_high = float(column.min()), float(column.max())
        low = high = covered = None
        if usual is not None:
            low, high = float(usual[0][index]), float(usual[1][index])
            if high > low:
                overlap = min(visited_high, high) - max(visited_low, low)
                covered = max(0.0, overlap) / (high - low)
        outside = 0.0
        if limits is not None:
            least, most = float(limits[0][index]), float(limits[1][index])
            if most > least:
                # float32 readings of a float64 limit must not count as outside of it.
                slack = 1e-6 * (most - least)
                outside = float(np.mean((column < least - slack) | (column > most + slack)))
        found.append(
            JointCoverage(
                key.key, joint.name, low, high, visited_low, visited_high, covered, outside
            )
        )
    return found


def _limits(key: StateKey) -> tuple[Float64Array, Float64Array] | None:
    """Return what the encoding scales by, low and high, float64 (D,)."""
    if key.mean is not None and key.std is not None:
        return key.mean - 2.0 * key.std, key.mean + 2.0 * key.std
    if key.low is not None and key.high is not None:
        return key.low, key.high
    return None


def _camera(camera: str, seen: list[tuple[float, float]]) -> CameraCoverage:
    table = np.array(seen)
    (dark, dull), (light, sharp) = table.min(axis=0).tolist(), table.max(axis=0).tolist()
    brightness, contrast = table.mean(axis=0).tolist()
    return CameraCoverage(camera, (dark, brightness, light), (dull, contrast, sharp))


def _thin(
    samples: int,
    joints: Sequence[JointCoverage],
    cameras: Sequence[CameraCoverage],
    instructions: Mapping[str, int],
    timesteps: Mapping[int, int],
) -> list[str]:
    thin = []
    if samples < MIN_SAMPLES:
        thin.append(
            f"{samples} samples, fewer than {MIN_SAMPLES}: the scales hang on single observations"
        )
    if not joints:
        thin.append("the samples have no state, so joint ranges are unknown")
    for joint in joints:
        name = f"{joint.joint} ({joint.key})"
        if joint.covered is not None and joint.covered < MIN_JOINT_RANGE:
            thin.append(
                f"{name} visited {_percent(joint.covered)} of its recorded range "
                f"{_range(joint.low, joint.high)}"
            )
        if joint.outside > MAX_OUTSIDE:
            thin.append(
                f"{name} lies outside of its recorded range in {_percent(joint.outside)} of the "
                "samples: unit, sign or offset may be wrong"
            )
    untold = [instruction for instruction, count in instructions.items() if not count]
    if untold:
        listed = ", ".join(map(repr, untold))
        thin.append(f"of the bundle's instructions {len(untold)} have no sample: {listed}")
    for instruction, count in instructions.items():
        if not instruction:
            thin.append(f"{count} samples have no instruction on record")
        elif 0 < count < MIN_INSTRUCTION_SHARE * samples:
            thin.append(f"the instruction {instruction!r} has {count} of {samples} samples")
    if not timesteps:
        thin.append(
            "no sample has inputs of the action head: groot-int8 calibrate --complete adds them"
        )
    if not cameras:
        thin.append("the samples have no images")
    for camera in cameras:
        least, _, most = camera.brightness
        if least < DARK:
            thin.append(f"camera {camera.camera} has images as dark as {least:.0f} of 255")
        if most > BRIGHT:
            thin.append(f"camera {camera.camera} has images as bright as {most:.0f} of 255")
        if camera.contrast[0] < MIN_CONTRAST:
            thin.append(
                f"camera {camera.camera} has images of nearly one colour (deviation "
                f"{camera.contrast[0]:.1f} of 255): is the lens covered?"
            )
        if most - least < MIN_BRIGHTNESS_RANGE:
            thin.append(
                f"camera {camera.camera} saw one light only (mean {least:.0f} to {most:.0f} of "
                "255)"
            )
    return thin


def _range(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100.0 * part:.0f} %"


def _triple(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)


def _counts(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{bucket} ({count}x)" for bucket, count in counts.items())
