"""The doctor against real processes: a sound robot is found sound, each fault is named.

The robot's drivers, the policy node and the doctor each run in a process of their own over DDS.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from groot_int8_ros.policy.bundle import open_bundle

DEADLINE_S = 120.0
# Within the range whose ports lie below Linux's ephemeral ones, another for each test process.
DOMAIN_ID = 1 + os.getpid() % 100
ENVIRONMENT = os.environ | {"ROS_DOMAIN_ID": str(DOMAIN_ID), "OMP_NUM_THREADS": "1"}

Found = dict[str, Any]
Drive = Callable[..., None]


@contextmanager
def process(log: Path, *command: str) -> Iterator[None]:
    with log.open("w") as output:
        started = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
    try:
        yield
    finally:
        started.kill()
        started.wait()


@pytest.fixture
def drive(tmp_path: Path, tiny_bundle: Path) -> Iterator[Drive]:
    """Starts the robot's drivers, spoilt as told."""
    script = Path(__file__).with_name("robot_process.py")
    with ExitStack() as stack:

        def start(**spoil: object) -> None:
            log = tmp_path / "drivers.txt"
            arguments = (str(script), str(tiny_bundle), json.dumps(spoil))
            stack.enter_context(process(log, *arguments))

        yield start


@pytest.fixture
def start_policy(tmp_path: Path, tiny_bundle: Path) -> Iterator[Drive]:
    with ExitStack() as stack:

        def start(**changes: object) -> None:
            file = tmp_path / "policy.yaml"
            file.write_text(
                yaml.safe_dump({"/**": {"ros__parameters": parameters(tiny_bundle, **changes)}})
            )
            stack.enter_context(
                process(
                    tmp_path / "policy.txt",
                    *(
                        "-m",
                        "groot_int8_ros.policy_node",
                        "--ros-args",
                        "--params-file",
                        str(file),
                    ),
                )
            )

        yield start


def parameters(bundle: Path, *raw: str, **changes: object) -> dict[str, object]:
    cameras = open_bundle(bundle, verify_hashes=False).manifest.robot.cameras
    return {
        "cameras": {
            camera.key: {"transport": "raw" if camera.key in raw else "compressed"}
            for camera in cameras
        },
        "bundle": str(bundle),
        "threads": 1,
        "instruction": "pick up the cube",
        "max_observation_age_s": 2.0,
        "max_observation_skew_s": 2.0,
        # What a busy machine gets through of the drivers' 20 Hz.
        "inference_rate_hz": 0.5,
        "autostart": True,
    } | changes


def doctor(*options: str) -> tuple[int, list[Found]]:
    done = subprocess.run(
        [*(sys.executable, "-m", "offline_tools.cli", "doctor", "--json"), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        env=ENVIRONMENT,
    )
    assert done.stdout.startswith("{"), done.stderr
    content = json.loads(done.stdout)
    assert content["exit_code"] == done.returncode
    return done.returncode, content["findings"]


def faults(findings: list[Found]) -> dict[str, str]:
    by_subject: dict[str, str] = {}
    for found in findings:
        if found["level"] == "FAULT":
            text = f"{found['message']} {found['advice']}"
            by_subject[found["subject"]] = by_subject.get(found["subject"], "") + text
    return by_subject


def test_sound_system_has_no_fault_and_every_part_of_it_was_looked_at(
    drive: Drive, start_policy: Drive, tiny_bundle: Path
) -> None:
    drive()
    start_policy()
    end_s = time.monotonic() + DEADLINE_S
    while True:
        # The bundle, the engine and every topic come from the running node alone.
        code, findings = doctor()
        if code == 0 or time.monotonic() > end_s:
            break
    assert faults(findings) == {}
    assert code == 0, findings
    looked_at = {found["subject"]: found for found in findings if found["level"] == "ok"}
    cameras = [
        f"camera {camera.key}" for camera in open_bundle(tiny_bundle).manifest.robot.cameras
    ]
    assert {
        *cameras,
        *("joint_state", "observation", "clock", "policy node", "bundle", "engine", "memory"),
        *("power mode", "system clock", "heartbeat of policy_node"),
    } <= looked_at.keys()
    assert "active" in looked_at["policy node"]["message"]
    # Nobody executes the chunks here, which is to be known and no fault.
    warned = {found["subject"] for found in findings if found["level"] == "warning"}
    # A machine that is too slow for the bundle is told so, and that is no fault of the doctor's.
    slow = "policy_node says of chunk length"
    assert warned - {"bundle", "middleware", slow} == {"action chunks"}


def test_each_fault_of_a_stream_is_named_with_its_topic_and_what_to_do(
    drive: Drive, tiny_bundle: Path, tmp_path: Path
) -> None:
    # Without the policy node: drivers are set right before it is started.
    robot = open_bundle(tiny_bundle).manifest.robot
    front, wrist = (camera.key for camera in robot.cameras)
    lost = next(iter(robot.state_joints.values()))[0].name
    file = tmp_path / "robot.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "/**": {
                    "ros__parameters": parameters(
                        tiny_bundle, front, sensor_qos={"reliability": "reliable", "depth": 1}
                    )
                }
            }
        )
    )
    for spoil, wanted in (
        (
            {"skip": [wrist], "encoding": {front: "bayer_rggb8"}, "size": {front: [8, 8]}}
            | {"lose": [lost]},
            {
                f"camera {wrist}": f"nobody publishes .*{wrist}.*cameras.{wrist}.topic",
                f"camera {front}": "bayer_rggb8.*not understood",
                "joint_state": f"missing {lost}.*state_joints",
            },
        ),
        (
            {"size": {front: [32, 48]}, "best_effort": [wrist]},
            {
                f"camera {front}": "48x32 pixels, but the bundle was exported for",
                f"camera {wrist}": "cannot connect.*sensor_qos.reliability",
            },
        ),
        (
            {"size": {front: [32, 48]}, "behind_s": 60.0}
            | {"frame_id": {front: f"{wrist}_camera_optical_frame", wrist: "sensor_0"}},
            {
                f"camera {front}": "stale.*6[0-9].*max_observation_age_s = 2.*clocks",
                f"camera {wrist}": "stale",
                "joint_state": "stale",
            },
        ),
    ):
        with ExitStack() as stack:
            log = tmp_path / "spoilt.txt"
            script = Path(__file__).with_name("robot_process.py")
            stack.enter_context(
                process(log, str(script), str(tiny_bundle), json.dumps(spoil | {"raw": [front]}))
            )
            end_s = time.monotonic() + DEADLINE_S
            while True:
                code, findings = doctor("--params-file", str(file), "--seconds", "2")
                found = faults(findings)
                seen = found.keys() == wanted.keys() and all(
                    re.search(wanted[subject], found[subject]) for subject in wanted
                )
                # The drivers take their time to start, and until then it is that which is told.
                if seen or time.monotonic() > end_s:
                    break
        assert seen, (spoil, found)
        assert code == 1
        swapped = [one["subject"] for one in findings if "swapped" in one["message"]]
        assert swapped == ([f"camera {front}"] if "frame_id" in spoil else [])


def test_simulated_time_without_a_clock_is_a_fault(
    drive: Drive, tiny_bundle: Path, tmp_path: Path
) -> None:
    drive()
    file = tmp_path / "robot.yaml"
    file.write_text(
        yaml.safe_dump({"/**": {"ros__parameters": parameters(tiny_bundle, use_sim_time=True)}})
    )
    code, findings = doctor("--params-file", str(file), "--seconds", "2", "--no-hashes")
    assert code == 1
    assert "nothing came on /clock" in faults(findings)["clock"]


def test_without_rclpy_the_rest_is_checked_and_it_says_so(
    tiny_bundle: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "hidden" / "rclpy").mkdir(parents=True)
    (tmp_path / "hidden" / "rclpy" / "__init__.py").write_text("raise ImportError('hidden')")
    hidden = str(tmp_path / "hidden")

    def without_ros(bundle: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "offline_tools.cli", "doctor", "--bundle", str(bundle)],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
            env=ENVIRONMENT
            | {"PYTHONPATH": os.pathsep.join([hidden, os.environ.get("PYTHONPATH", "")])},
        )
        return done.returncode, done.stdout

    code, text = without_ros(tiny_bundle)
    assert code == 2
    assert "unchecked running system: rclpy cannot be imported" in text
    assert "every hash is right" in text
    graph = next((bundle_copy / "onnx").glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    code, text = without_ros(bundle_copy)
    assert code == 1
    assert "SHA-256 differs" in text
