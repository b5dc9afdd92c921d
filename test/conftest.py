"""Fixtures and settings that every test shares.

Owns: where recorded reference data is looked for, the environment that keeps tests from leaving
this machine, the ROS nodes by which tests listen, and the generated dataset, checkpoints and
bundles. Tracing a bundle takes most of a minute, so each is exported once and damaged only in
copies. Tests import nothing from here; they take fixtures by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .int8_record import quantization_record

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent

SHARED_DATA_VARIABLE = "GROOT_SHARED_DATA"

# Actions of these keys are absolute in generated checkpoints, all others relative to the state.
_HANDS = ("gripper", "left_hand", "right_hand")

# Set before any test imports rclpy or transformers, and inherited by the processes they start:
# neither DDS discovery nor a model hub may be reached from a test.
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell starts background jobs with SIGINT ignored, and every process they start inherits that:
# the tests that interrupt a command would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The folder that holds setup.py. Tests read it and never write into it."""
    return REPOSITORY_ROOT


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """The folder with recorded reference data, which is not part of the repository.

    It is `$GROOT_SHARED_DATA`, or the folder `shared` beside the repository. Where neither is
    there the test is skipped; a variable that names a missing folder is a mistake and fails.
    """
    named = os.environ.get(SHARED_DATA_VARIABLE)
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            pytest.fail(f"{SHARED_DATA_VARIABLE} names {folder}, which is not a folder")
        return folder
    folder = REPOSITORY_ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"no reference data: {SHARED_DATA_VARIABLE} is not set and there is no folder "
            "'shared' beside the repository"
        )
    return folder


def _folder_in(shared: Path, relative: str) -> Path:
    folder = shared / relative
    if not folder.is_dir():
        pytest.skip(f"no {relative} in the reference data folder {shared}")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_data_dir: Path) -> Path:
    """The golden vectors: a tiny checkpoint, its inputs and every intermediate tensor."""
    return _folder_in(shared_data_dir, "golden")


@pytest.fixture(scope="session")
def g1_dataset_dir(shared_data_dir: Path) -> Path:
    """Three real episodes of a Unitree G1 as a LeRobot v2.1 dataset."""
    return _folder_in(shared_data_dir, "data/g1_pick_bottle")


@pytest.fixture(scope="session")
def ros_node() -> Callable[..., contextlib.AbstractContextManager[tuple[Any, Any]]]:
    """Makes (name, domain), for the length of a block, a node and an executor that spins it.

    They have a ROS context of their own, which is the node's `context`.
    """
    rclpy = pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
    executors = pytest.importorskip("rclpy.executors")

    @contextlib.contextmanager
    def make(name: str, domain_id: int) -> Iterator[tuple[Any, Any]]:
        context = rclpy.Context()
        rclpy.init(args=[], context=context, domain_id=domain_id)
        node = rclpy.create_node(name, context=context)
        executor = executors.SingleThreadedExecutor(context=context)
        executor.add_node(node)
        try:
            yield node, executor
        finally:
            executor.shutdown()
            node.destroy_node()
            rclpy.shutdown(context=context)

    return make


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One generated episode of the six-joint arm with its two cameras. Tests only read it."""
    pytest.importorskip("av", reason="generating a dataset needs PyAV")
    from offline_tools.demo.arm_dataset import write_arm_dataset

    folder = tmp_path_factory.mktemp("tiny") / "dataset"
    write_arm_dataset(folder, episodes=1, frames=45, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_dataset: Path) -> Path:
    """An N1.6-shaped checkpoint for that arm, with random weights. Tests only read it."""
    _require_torch()
    from offline_tools.dataset.lerobot import LeRobotDataset
    from offline_tools.demo.random_checkpoint import write_random_checkpoint

    folder = tiny_dataset.parent / "checkpoint"
    write_random_checkpoint(
        folder, LeRobotDataset.open(tiny_dataset), seed=0, absolute_keys=("gripper",)
    )
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tiny_dataset: Path) -> Path:
    """The tiny checkpoint in float32 with two denoising steps. Tests only read it."""
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    folder = tiny_checkpoint.parent / "bundle"
    write_bundle(
        ExportOptions(
            checkpoint=tiny_checkpoint,
            bundle=folder,
            dataset=tiny_dataset,
            graphs="reference",
            precision="fp32",
            denoising_steps=2,
        ),
        report=lambda _: None,
    )
    return folder


@pytest.fixture(scope="session")
def deployed_bundle(tiny_checkpoint: Path, tiny_dataset: Path) -> Path:
    """Its deployed graphs in float32, with a prefix model. Tests only read it."""
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    folder = tiny_checkpoint.parent / "deployed"
    write_bundle(
        ExportOptions(
            checkpoint=tiny_checkpoint,
            bundle=folder,
            dataset=tiny_dataset,
            instructions=("pick up the cube", "Put the red cube into the green bowl."),
            max_prefix_tokens=40,
            prefix_model=True,
            precision="fp32",
            denoising_steps=2,
        ),
        report=lambda _: None,
    )
    return folder


_KILLED_CAPTURE = """
import os, signal, sys
from pathlib import Path
from groot_int8_ros.policy.policy import Policy
from offline_tools.calibration.dataset_source import DatasetSource
from offline_tools.calibration.run import capture

class Killed(DatasetSource):
    def observations(self, chosen):
        for number, one in enumerate(super().observations(chosen)):
            if number == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            yield one

bundle, dataset, store = map(Path, sys.argv[1:])
policy = Policy.load(bundle)
capture(policy, Killed(dataset, policy), store, samples=32, seed=0)
"""


@pytest.fixture(scope="session")
def kill_a_capture() -> Callable[[Path, Path, Path], None]:
    """Captures (bundle, dataset, store) 32 samples in a process that is killed after twenty.

    `calibrate --samples 32 --seed 0 --resume` goes on with it.
    """
    pytest.importorskip("av", reason="reading a dataset needs PyAV")

    def run(bundle: Path, dataset: Path, store: Path) -> None:
        command = [sys.executable, "-c", _KILLED_CAPTURE, str(bundle), str(dataset), str(store)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY_ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    return run


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def write_small_deployed() -> Callable[..., Path]:
    """Writes (folder, bundle to resemble) a deployed bundle of a few sums; see its module."""
    pytest.importorskip("onnx", reason="writing graphs needs onnx")
    written: Callable[..., Path] = runpy.run_path(
        str(Path(__file__).with_name("small_deployed.py"))
    )["write_small_deployed"]
    return written


@pytest.fixture(scope="session")
def small_deployed(
    write_small_deployed: Callable[..., Path],
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A deployed bundle of the tiny one's robot, with a prefix model. Tests only read it."""
    return write_small_deployed(tmp_path_factory.mktemp("small") / "bundle", tiny_bundle)


@pytest.fixture
def small_copy(small_deployed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(small_deployed, tmp_path / "small"))


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path], None]:
    """Writes the hashes and sizes of a bundle's files as they are now into its manifest."""

    def write(bundle: Path) -> None:
        manifest = bundle / "manifest.json"
        content = json.loads(manifest.read_text())
        for name, record in content["files"].items():
            data = (bundle / name).read_bytes()
            record.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        manifest.write_text(json.dumps(content))

    return write


@pytest.fixture(scope="session")
def slow_rows(
    write_small_deployed: Callable[..., Path],
    tiny_bundle: Path,
    reseal: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As the small bundle, for tests in real time on a busy machine. Tests only read it.

    Chunks last 1.6 s, frames are small, and each row can express what the others can: from -1 to 1
    around the state.
    """
    like = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("slow") / "like"))
    content = json.loads((like / "manifest.json").read_text())
    content["robot"]["action_period_s"] = 0.1
    for camera in content["robot"]["cameras"].values():
        camera |= {"width": 128, "height": 96}
    (like / "manifest.json").write_text(json.dumps(content))
    file = like / "statistics.json"
    (statistics,) = (tree := json.loads(file.read_text())).values()
    for modality in ("action", "relative_action"):
        for numbers in statistics[modality].values():
            for name, value in (("min", -1.0), ("q01", -1.0), ("max", 1.0), ("q99", 1.0)):
                numbers[name] = np.full_like(numbers[name], value).tolist()
    file.write_text(json.dumps(tree))
    reseal(like)
    return write_small_deployed(like.with_name("bundle"), like)


@pytest.fixture(scope="session")
def write_minimal_checkpoint() -> Callable[[Path, Path], None]:
    """Writes (folder, dataset) a tiny checkpoint with as few layers as there are kinds of them."""
    _require_torch()
    from offline_tools.dataset.lerobot import LeRobotDataset
    from offline_tools.demo import random_checkpoint

    tiny = random_checkpoint.SIZES["tiny"]
    minimal = replace(
        tiny,
        vision=replace(tiny.vision, layers=1),
        language=replace(tiny.language, layers=1),
        # Cross-attention to text, self-attention, cross-attention to images.
        dit=replace(tiny.dit, layers=3),
    )

    def write(folder: Path, dataset: Path) -> None:
        opened = LeRobotDataset.open(dataset)
        hands = tuple(key for key in opened.action_keys if key in _HANDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(random_checkpoint.SIZES, "minimal", minimal)
            random_checkpoint.write_random_checkpoint(
                folder, opened, size="minimal", absolute_keys=hands
            )

    return write


@pytest.fixture(scope="session")
def minimal_checkpoint(
    write_minimal_checkpoint: Callable[[Path, Path], None],
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As the tiny checkpoint, with as few layers as there are kinds of them: quick to trace."""
    folder = tmp_path_factory.mktemp("minimal") / "checkpoint"
    write_minimal_checkpoint(folder, tiny_dataset)
    return folder


@pytest.fixture(scope="session")
def fp16_bundle(minimal_checkpoint: Path, tiny_dataset: Path) -> Path:
    """The minimal checkpoint in half precision. Tests only read it."""
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    folder = minimal_checkpoint.parent / "bundle"
    write_bundle(
        ExportOptions(
            checkpoint=minimal_checkpoint,
            bundle=folder,
            dataset=tiny_dataset,
            graphs="reference",
        ),
        report=lambda _: None,
    )
    return folder


@pytest.fixture(scope="session")
def fp16_deployed(minimal_checkpoint: Path, tiny_dataset: Path) -> Path:
    """Its deployed graphs, with the dataset's instructions. Tests only read it."""
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    folder = minimal_checkpoint.parent / "deployed"
    write_bundle(
        ExportOptions(checkpoint=minimal_checkpoint, bundle=folder, dataset=tiny_dataset),
        report=lambda _: None,
    )
    return folder


@pytest.fixture(scope="session")
def write_int8(reseal: Callable[[Path], None]) -> Callable[[Path, Path, Sequence[str]], Path]:
    """Writes (folder, float bundle, graphs) a copy whose graphs are INT8, scaled row by row."""
    pytest.importorskip("onnx", reason="quantisation needs the extra 'offline'")
    from groot_int8_ros.policy.bundle import open_bundle
    from groot_int8_ros.policy.quantization import LayerScheme
    from offline_tools.quantize.layers import find_layers, load_graph
    from offline_tools.quantize.qdq import quantize_graph

    def write(folder: Path, source: Path, names: Sequence[str]) -> Path:
        bundle = open_bundle(source, verify_hashes=False)
        shutil.copytree(source, folder)
        content = json.loads((folder / "manifest.json").read_text())
        for name in names:
            graph = bundle.graph_path(name)
            layers = [layer.name for layer in find_layers(load_graph(graph))]
            target = folder / graph.relative_to(source)
            quantize_graph(graph, target, dict.fromkeys(layers, LayerScheme("row")), None)
            record = {"precision": "int8", "quantization": quantization_record(layers)}
            content["graphs"][name].update(record)
        (folder / "manifest.json").write_text(json.dumps(content))
        reseal(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy as a bundle of reference graphs. Tests only read it."""
    _require_torch()
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle
    from offline_tools.training.shipped import POLICY_FOLDER

    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    write_bundle(
        ExportOptions(
            checkpoint=POLICY_FOLDER,
            bundle=folder,
            robot=REPOSITORY_ROOT / "config" / "simulated_arm.yaml",
            graphs="reference",
            precision="fp32",
        ),
        report=lambda _: None,
    )
    return folder


def _require_torch() -> None:
    for name in ("torch", "transformers", "safetensors"):
        pytest.importorskip(name, reason=f"checkpoints need {name}")
