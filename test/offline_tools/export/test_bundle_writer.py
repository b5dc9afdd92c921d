"""Hazards of the export: bad input found late, half a bundle left, an old bundle lost.

Each refusal is shown through the command: its message, its exit code, and the folder around the
bundle, which must hold what it held before.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groot_int8_ros.policy.bundle import open_bundle
from offline_tools.cli import main
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.demo import random_checkpoint
from offline_tools.export import bundle_writer, graph
from offline_tools.export.graph import weight_bytes
from offline_tools.export.graphs import reference_graphs
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import load_model_config

from .conftest import Exporter
from .exporter import beginning_with

Json = Any


@pytest.fixture
def checkpoint(minimal_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(minimal_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in several files, to be damaged."""
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 1 << 20)
    folder = tmp_path / "checkpoint"
    random_checkpoint.write_random_checkpoint(folder, LeRobotDataset.open(tiny_dataset))
    return folder


class Output:
    """The folder in which a bundle is to appear, and what a refusal must leave of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.bundle = folder / "bundle"
        self._capsys = capsys
        folder.mkdir()

    def content(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes() if path.is_file() else b""
            for path in self.folder.rglob("*")
        }

    def refuses(self, checkpoint: Path, dataset: Path, message: str, *options: object) -> None:
        """Run the export, and show that it refuses with a message and writes nothing."""
        before = self.content()
        code = main(_arguments(checkpoint, dataset, self.bundle, *options))
        error = self._capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("groot-int8: ")
        assert message in error
        assert "Traceback" not in error
        assert self.content() == before


def _arguments(checkpoint: Path, dataset: Path, bundle: Path, *options: object) -> list[str]:
    words = ["export", "--checkpoint", checkpoint, "--bundle", bundle, "--dataset", dataset]
    return [str(word) for word in (*words, "--graphs", "reference", *options)]


@pytest.fixture
def output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Output:
    return Output(tmp_path / "out", capsys)


def _edit(path: Path, change: Callable[[Json], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = checkpoint / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


_DECODER = "action_head.action_decoder.layer1.W"

_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        shutil.rmtree,
        "checkpoint. A checkpoint is a folder with config.json, processor_config.json, "
        "statistics.json and model.safetensors",
    ),
    "weights missing": (
        lambda c: (c / "model.safetensors").unlink(),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "weights truncated": (
        lambda c: _truncate(c / "model.safetensors"),
        "model.safetensors is truncated or was overwritten",
    ),
    "weights cut inside the header": (
        lambda c: (c / "model.safetensors").write_bytes(b"\x10\x00"),
        "its header is cut off",
    ),
    "weights already quantised": (
        lambda c: _edit_weights(c, lambda w: w.update({_DECODER: w[_DECODER].to(torch.int8)})),
        f"{_DECODER}: I8",
    ),
    "a tensor missing": (
        lambda c: _edit_weights(c, lambda w: w.pop(_DECODER)),
        f"1 missing:\n  {_DECODER}",
    ),
    "a tensor of another shape": (
        lambda c: _edit_weights(
            c, lambda w: w.update({_DECODER: w[_DECODER][:, :, 1:].contiguous()})
        ),
        f"{_DECODER}: expected [32, 64, 64], found [32, 64, 63]",
    ),
    "config with more layers than the weights": (
        lambda c: _edit(
            c / "config.json", lambda f: f["diffusion_model_cfg"].update(num_layers=4)
        ),
        "does not hold the model that its configuration describes",
    ),
    "config missing": (
        lambda c: (c / "config.json").unlink(),
        "config.json is missing. A checkpoint is a folder with config.json",
    ),
    "config of another model": (
        lambda c: _edit(c / "config.json", lambda f: f.update(model_type="Gr00tN1d5")),
        'model_type is "Gr00tN1d5"; only "Gr00tN1d6" is implemented',
    ),
    "processor of another checkpoint": (
        lambda c: _edit(
            c / "processor_config.json",
            lambda f: f["processor_kwargs"].update(max_state_dim=64),
        ),
        "max_state_dim of the model is 29 but max_state_dim of the processor is 64",
    ),
    "fewer embodiments than the row": (
        lambda c: _edit(c / "config.json", lambda f: f.update(max_num_embodiments=8)),
        "embodiment 'new_embodiment' has the row 10, but the checkpoint has 8 embodiments",
    ),
    "fewer steps than are decoded": (
        lambda c: _edit(c / "config.json", lambda f: f.update(action_horizon=8)),
        "the processor decodes action step 15, but the model predicts 8 steps",
    ),
    "statistics missing": (
        lambda c: (c / "statistics.json").unlink(),
        "statistics.json is missing",
    ),
    "statistics of a key missing": (
        lambda c: _edit(
            c / "statistics.json", lambda f: f["new_embodiment"]["state"].pop("single_arm")
        ),
        "single_arm",
    ),
    "statistics truncated": (
        lambda c: _truncate(c / "statistics.json"),
        "statistics.json is not valid JSON",
    ),
    "tokenizer missing": (
        lambda c: (c / "tokenizer.json").unlink(),
        "tokenizer.json does not exist. Released checkpoints do not carry the tokenizer: pass "
        "--tokenizer",
    ),
    "tokenizer truncated": (
        lambda c: _truncate(c / "tokenizer.json"),
        "tokenizer.json",
    ),
    "tokenizer of another model": (
        lambda c: _edit(c / "eagle_config.json", lambda f: f.update(image_token_index=7)),
        "tokenizer.json gives image tokens the id 5, the model expects 7: pass the tokenizer",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_checkpoint_is_refused_before_anything_is_written(
    checkpoint: Path, tiny_dataset: Path, output: Output, damage: str
) -> None:
    harm, message = _DAMAGES[damage]
    harm(checkpoint)
    output.refuses(checkpoint, tiny_dataset, message)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "shards, of which 1 are missing:\n  model-00002-of-"),
        (_truncate, "is truncated or was overwritten"),
    ],
)
def test_missing_or_truncated_shard_is_refused_by_name(
    sharded: Path,
    tiny_dataset: Path,
    output: Output,
    harm: Callable[[Path], object],
    message: str,
) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    harm(shards[1])
    output.refuses(sharded, tiny_dataset, message)


def test_tokenizer_without_image_tokens_is_refused(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path, output: Output
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    text = (checkpoint / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<IMG_CONTEXT>", "<OTHER>"))
    output.refuses(checkpoint, tiny_dataset, "<IMG_CONTEXT>", "--tokenizer", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--embodiment", "gr1"), "gr1"),
        (
            ("--eagle-config", "absent.json"),
            "absent.json is missing. --eagle-config takes the JSON file",
        ),
        (("--eagle-config", "."), ". is a folder. --eagle-config takes the JSON file"),
        (("--tokenizer", "absent"), "absent/tokenizer.json does not exist"),
        (("--robot", "absent.yaml"), "cannot read the robot description absent.yaml"),
        (("--dataset", "absent"), "absent"),
    ],
)
def test_option_that_names_what_is_not_there_is_refused(
    checkpoint: Path,
    tiny_dataset: Path,
    output: Output,
    options: tuple[str, str],
    message: str,
) -> None:
    output.refuses(checkpoint, tiny_dataset, message, *options)


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ("cameras: {}", "action_period_s must be a finite number"),
        (
            "{action_period_s: 0.1, state_joints: {gripper: [a, a]}}",
            "state_joints.gripper names the joint 'a' twice",
        ),
        (
            "{action_period_s: 0.1, state_joints: {gripper: [{name: a, unit: turns}]}}",
            "state_joints.gripper[0].unit must be one of radians, degrees, raw, not 'turns'",
        ),
        (
            "{action_period_s: 0.1, state_joints: {single_arm: [a, b]}}",
            "the state key 'single_arm' has 5 dimensions in the checkpoint's statistics, but 2 "
            "joints are given for it",
        ),
        (
            "{action_period_s: 0.1, cameras: {front: {width: 640, height: 200}}}",
            "all cameras must reach the network at one size",
        ),
    ],
)
def test_wrong_robot_file_is_refused(
    checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    output: Output,
    robot: str,
    message: str,
) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(robot)
    output.refuses(checkpoint, tiny_dataset, message, "--robot", path)


def test_camera_that_neither_robot_file_nor_dataset_knows_is_refused(
    checkpoint: Path, tmp_path: Path, output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = tmp_path / "robot.yaml"
    robot.write_text("{action_period_s: 0.1, cameras: {front: {width: 640, height: 480}}}")
    words = ["export", "--checkpoint", checkpoint, "--bundle", output.bundle, "--robot", robot]
    assert main([str(word) for word in words]) == 2
    assert "the checkpoint sees through a camera 'wrist'" in capsys.readouterr().err
    assert output.content() == {}


def test_folder_that_is_no_bundle_is_never_replaced(
    checkpoint: Path, tiny_dataset: Path, output: Output
) -> None:
    output.bundle.mkdir()
    (output.bundle / "thesis.txt").write_text("the only copy")
    output.refuses(checkpoint, tiny_dataset, "exists and is not a bundle", "--force")


def test_file_in_the_bundles_place_is_never_replaced(
    checkpoint: Path, tiny_dataset: Path, output: Output
) -> None:
    output.bundle.write_text("the only copy")
    output.refuses(checkpoint, tiny_dataset, "exists and is not a bundle", "--force")


def test_bundle_is_replaced_only_when_asked(
    checkpoint: Path, tiny_dataset: Path, tiny_bundle: Path, output: Output
) -> None:
    shutil.copytree(tiny_bundle, output.bundle)
    output.refuses(checkpoint, tiny_dataset, "already holds a bundle: add --force to replace it")


def test_bundle_to_be_replaced_stays_whole_when_the_export_is_refused(
    checkpoint: Path, tiny_dataset: Path, tiny_bundle: Path, output: Output
) -> None:
    shutil.copytree(tiny_bundle, output.bundle)
    (checkpoint / "statistics.json").unlink()
    output.refuses(checkpoint, tiny_dataset, "statistics.json is missing", "--force")
    open_bundle(output.bundle)


def test_output_below_a_file_is_refused_with_its_name(
    checkpoint: Path, tiny_dataset: Path, output: Output
) -> None:
    (output.folder / "file").write_text("in the way")
    output.bundle = output.folder / "file" / "bundle"
    output.refuses(checkpoint, tiny_dataset, f"cannot write {output.bundle}")


def test_disk_that_is_too_small_is_seen_before_writing(
    checkpoint: Path, tiny_dataset: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(output.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50 << 20))
    output.refuses(checkpoint, tiny_dataset, "has 0.1 GB free; nothing was written. Free space")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_forecast_of_the_disk_space_is_what_the_weights_take(
    request: pytest.FixtureRequest, precision: str
) -> None:
    # The first checkpoint is stored in half the bytes of its bundle, the second in as many.
    names = {
        "fp32": ("tiny_bundle", "tiny_checkpoint"),
        "fp16": ("fp16_bundle", "minimal_checkpoint"),
    }
    folder, checkpoint = (request.getfixturevalue(name) for name in names[precision])
    bundle = open_bundle(folder, verify_hashes=False)
    height, width = bundle.manifest.graphs["backbone"].inputs["pixel_values"].shape[2:]
    graphs = reference_graphs(
        load_model_config(checkpoint)[0],
        CheckpointReader(checkpoint).tensor,
        embodiment_id=bundle.processor.embodiment_id,
        image_shape=(int(height), int(width)),
        precision=precision,
    )
    for name, reference in graphs.items():
        written = bundle.graph_path(name).with_suffix(".onnx.data").stat().st_size
        # Tables that the graph holds beside its weights, and padding, are small.
        assert 0.9 * written <= weight_bytes(reference.spec) <= 1.1 * written, name


@pytest.fixture
def begin_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Export one graph before the others, so that its failure need not wait for theirs."""

    def begin(name: str) -> None:
        monkeypatch.setattr(bundle_writer, "reference_graphs", beginning_with(name))

    return begin


@pytest.mark.parametrize("there_before", [False, True])
def test_weight_that_is_not_a_number_is_named_and_nothing_is_kept(
    checkpoint: Path,
    tiny_dataset: Path,
    tiny_bundle: Path,
    output: Output,
    begin_with: Callable[[str], None],
    there_before: bool,
) -> None:
    if there_before:
        shutil.copytree(tiny_bundle, output.bundle)
    begin_with("action_decoder")
    _edit_weights(checkpoint, lambda w: w[_DECODER][10].fill_(float("nan")))
    output.refuses(
        checkpoint,
        tiny_dataset,
        "the weight action_decoder.layer1.W holds NaN or infinity: the checkpoint is damaged",
        *["--force"] * there_before,
    )


def test_weight_beyond_half_precision_is_named_with_the_way_out(
    checkpoint: Path,
    tiny_dataset: Path,
    output: Output,
    begin_with: Callable[[str], None],
) -> None:
    begin_with("dit")
    key = "action_head.model.transformer_blocks.0.ff.net.2.weight"
    _edit_weights(checkpoint, lambda w: w[key].view(-1)[0].fill_(1e5))
    output.refuses(
        checkpoint,
        tiny_dataset,
        "transformer_blocks.0.ff.net.2.weight has values that float16 cannot hold; export with "
        "--precision fp32",
    )


def test_checkpoint_that_vanishes_during_the_export_is_no_output_error(
    checkpoint: Path,
    tiny_dataset: Path,
    output: Output,
    begin_with: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin_with("action_decoder")
    trace = graph.trace

    def unplugged(*args: Any) -> Any:
        traced = trace(*args)
        (checkpoint / "model.safetensors").unlink()
        return traced

    monkeypatch.setattr(bundle_writer, "trace", unplugged)
    output.refuses(checkpoint, tiny_dataset, "model.safetensors cannot be read at action_head.")


@pytest.fixture
def arguments(minimal_checkpoint: Path, tiny_dataset: Path, output: Output) -> list[str]:
    return _arguments(minimal_checkpoint, tiny_dataset, output.bundle)


def test_full_disk_during_the_export_is_one_message_and_nothing_is_kept(
    exporter: Exporter, arguments: list[str], output: Output, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert exporter.run(arguments, log, first_graph="conditioner", file_limit_bytes=20_000) == 2
    text = log.read_text()
    assert f"groot-int8: cannot write {output.bundle}: the disk may be full" in text
    assert "Traceback" not in text
    assert "conditioner: writing weights" in text
    assert output.content() == {}


# Drawn anew in each run and named in the test's output. The graphs come in an order in which the
# delays reach from the command's first steps over the writing of weights to a later graph.
_MOMENTS = [
    (number, when, round(random.uniform(0.0, longest_s), 3))
    for number, when, longest_s in (
        (signal.SIGINT, "", 0.5),
        (signal.SIGINT, "action_decoder: tracing", 2.0),
        (signal.SIGTERM, "action_decoder: writing weights", 0.3),
        (signal.SIGINT, "action_encoder: tracing", 2.0),
        (signal.SIGTERM, "backbone: tracing", 4.0),
    )
]


@pytest.mark.parametrize(("number", "when", "delay_s"), _MOMENTS)
def test_interrupted_export_leaves_nothing(
    exporter: Exporter,
    arguments: list[str],
    output: Output,
    tmp_path: Path,
    number: signal.Signals,
    when: str,
    delay_s: float,
) -> None:
    log = tmp_path / "log"
    first = when.partition(":")[0] or None
    code = exporter.run(
        arguments, log, number=number, when=when, delay_s=delay_s, first_graph=first
    )
    text = log.read_text()
    assert code == 128 + number, text
    assert "nothing half-written was kept" in text
    assert "Traceback" not in text
    assert output.content() == {}


def test_interrupted_replacement_leaves_the_old_bundle_whole(
    exporter: Exporter, arguments: list[str], output: Output, tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, output.bundle)
    before = output.content()
    log = tmp_path / "log"
    code = exporter.run(
        [*arguments, "--force"], log, number=signal.SIGTERM, when="backbone: tracing"
    )
    assert code == 143, log.read_text()
    assert output.content() == before


def test_killed_export_leaves_no_folder_that_passes_for_a_bundle(
    exporter: Exporter, arguments: list[str], output: Output, tmp_path: Path
) -> None:
    code = exporter.run(
        arguments,
        tmp_path / "log",
        number=signal.SIGKILL,
        when="action_decoder: done",
        first_graph="action_decoder",
    )
    assert code == -signal.SIGKILL
    left = list(output.folder.iterdir())
    assert left
    assert all(path.name.startswith(".partial-bundle-") for path in left)
    assert list(output.folder.rglob("action_decoder.onnx.data"))
    assert not list(output.folder.rglob("manifest.json"))


@pytest.fixture
def started(arguments: list[str], repository_root: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a user starts it, still importing torch."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "offline_tools.cli", *arguments],
        cwd=repository_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_torch_is_imported_ends_quietly(
    started: subprocess.Popen[str], output: Output, number: signal.Signals
) -> None:
    assert started.stderr is not None
    # Python reports each import as it ends; at this one the command itself has begun.
    for line in started.stderr:
        if line.rstrip().endswith("torch.version"):
            break
    started.send_signal(number)
    _, error = started.communicate(timeout=120)
    assert started.returncode == 128 + number, error
    assert "nothing half-written was kept" in error
    assert "Traceback" not in error
    assert output.content() == {}
