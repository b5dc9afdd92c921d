"""Hazards of verification: a graph that is wrong and passes, a bundle of another checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the reference runs in torch")
pytest.importorskip("transformers", reason="the reference needs transformers")

from groot_int8_ros.policy.prompt_bank import read_prefix
from groot_int8_ros.policy.types import UInt8Array
from offline_tools.cli import main
from offline_tools.dataset import lerobot, video

Reseal = Callable[[Path], None]

TENSORS = {
    "backbone: hidden_states, text tokens",
    "backbone: hidden_states, image tokens",
    "backbone: attn_mask",
    "backbone: image_mask",
    "conditioner: vl_embs",
    "conditioner: state_features",
    "action_encoder: sa_embs",
    "dit: output",
    "action_decoder: velocity",
    "action_pred, end to end",
}


CHAIN = "image chain: grey levels"
FROM_PIXELS = {
    "backbone from recorded pixels: features, text tokens",
    "backbone from recorded pixels: features, image tokens",
    "action_pred, from recorded pixels",
}
FROM_FRAMES = {
    "backbone from frames: features, text tokens",
    "backbone from frames: features, image tokens",
    "action_pred, from frames",
}
HEAD = "action_head: action_pred"


def _verify(bundle: Path, checkpoint: Path, *options: object) -> int:
    words = ["verify", "--bundle", bundle, "--checkpoint", checkpoint, *options]
    return main([str(word) for word in words])


def _report(bundle: Path) -> dict[str, dict[str, object]]:
    report = json.loads((bundle / "reports" / "verify.json").read_text())
    return {"": report} | {tensor["name"]: tensor for tensor in report["tensors"]}


@pytest.mark.parametrize("recorded", [True, False])
def test_exported_bundle_passes_on_recorded_frames_and_on_noise(
    bundle_copy: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    capsys: pytest.CaptureFixture[str],
    recorded: bool,
) -> None:
    options = ("--dataset", tiny_dataset) if recorded else ()
    assert _verify(bundle_copy, tiny_checkpoint, *options, "--samples", 2) == 0
    report = _report(bundle_copy)
    assert report[""]["passed"] is True
    assert report[""]["samples"] == 2
    assert report[""]["source"] == ("dataset" if recorded else "generated noise")
    assert set(report) - {""} == TENSORS
    # Far inside of the thresholds: the same arithmetic in another order.
    assert all(float(str(report[name]["relative_l2"])) < 1e-4 for name in TENSORS)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("PASS")
    assert all(name in printed for name in TENSORS)


def test_half_precision_passes_and_is_measurably_not_float32(
    fp16_bundle: Path, minimal_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(fp16_bundle, tmp_path / "bundle"))
    assert _verify(bundle, minimal_checkpoint, "--samples", 1) == 0
    report = _report(bundle)
    for name in ("backbone: hidden_states, text tokens", "dit: output"):
        assert 1e-5 < float(str(report[name]["relative_l2"])) < 2e-2
    assert report["backbone: image_mask"]["relative_l2"] == 0.0


def _spoil(bundle: Path, graph: str, layer: str, change: Callable[[np.ndarray], None]) -> None:  # type: ignore[type-arg]
    """Change one layer's weight where it lies in the external data."""
    path = bundle / "onnx" / graph
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name.startswith(f"{layer}/")]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    place = {entry.key: entry.value for entry in tensor.external_data}
    weights = np.memmap(
        path.with_name(place["location"]),
        np.float32,
        "r+",
        offset=int(place.get("offset", 0)),
        shape=(int(place["length"]) // 4,),
    )
    change(weights)
    weights.flush()


def _negate(weights: np.ndarray) -> None:  # type: ignore[type-arg]
    weights *= -1


def _put_nan(weights: np.ndarray) -> None:  # type: ignore[type-arg]
    weights[7] = np.nan


@pytest.mark.parametrize(
    ("graph", "layer", "change", "failing"),
    [
        (
            "dit_model.onnx",
            "transformer_blocks.2.ff.net.2",
            _negate,
            {"dit: output", "action_pred, end to end"},
        ),
        (
            "backbone_model.onnx",
            "backbone.model.language_model.model.layers.1.mlp.down_proj",
            _put_nan,
            {"backbone: hidden_states, text tokens", "backbone: hidden_states, image tokens"},
        ),
    ],
)
def test_wrong_weight_fails_where_it_is_and_nowhere_before(
    bundle_copy: Path,
    tiny_checkpoint: Path,
    reseal: Reseal,
    capsys: pytest.CaptureFixture[str],
    graph: str,
    layer: str,
    change: Callable[[np.ndarray], None],  # type: ignore[type-arg]
    failing: set[str],
) -> None:
    _spoil(bundle_copy, graph, layer, change)
    reseal(bundle_copy)
    assert _verify(bundle_copy, tiny_checkpoint, "--samples", 1) == 1
    assert (
        "FAIL: the graphs do not compute what the checkpoint computes" in capsys.readouterr().out
    )
    report = _report(bundle_copy)
    assert report[""]["passed"] is False
    failed = {name for name in TENSORS if report[name]["passed"] is False}
    assert failed - {"action_pred, end to end"} == failing - {"action_pred, end to end"}
    assert "action_pred, end to end" in failed


def test_threshold_that_the_user_sets_decides(
    bundle_copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(bundle_copy, tiny_checkpoint, "--samples", 1, "--atol", 1e-12) == 1
    assert "p99 < 1e-12" in capsys.readouterr().out


def test_bundle_changed_without_its_hash_is_refused_before_it_is_compared(
    bundle_copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(bundle_copy, "dit_model.onnx", "transformer_blocks.2.ff.net.2", _negate)
    assert _verify(bundle_copy, tiny_checkpoint) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    assert not (bundle_copy / "reports").exists()


def test_bundle_of_another_checkpoint_is_refused(
    bundle_copy: Path, minimal_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(bundle_copy, minimal_checkpoint) == 2
    assert "was exported from another checkpoint than" in capsys.readouterr().err
    assert not (bundle_copy / "reports").exists()


def test_checkpoint_with_other_statistics_is_another_checkpoint(
    bundle_copy: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    statistics = copy / "statistics.json"
    statistics.write_text(statistics.read_text() + " ")
    assert _verify(bundle_copy, copy) == 2
    assert "was exported from another checkpoint than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "absent"), "absent"),
        (("--episode", 9, "--dataset", "@dataset"), "9"),
    ],
)
def test_wrong_option_is_one_message(
    bundle_copy: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    words = [tiny_dataset if word == "@dataset" else word for word in options]
    assert _verify(bundle_copy, tiny_checkpoint, *words) == 2
    assert message in capsys.readouterr().err


def test_frames_behind_the_last_wanted_one_are_not_decoded(
    bundle_copy: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = video.read_rgb_frames
    decoded: list[Path] = []

    def counted(path: Path, count: int, size: tuple[int, int]) -> Iterator[UInt8Array]:
        for frame in read(path, count, size):
            decoded.append(path)
            yield frame

    monkeypatch.setattr(lerobot, "read_rgb_frames", counted)
    assert _verify(bundle_copy, tiny_checkpoint, "--dataset", tiny_dataset, "--samples", 1) == 0
    # The first frame of each of the two cameras, of 45.
    assert len(decoded) == len(set(decoded)) == 2


def test_dataset_of_other_cameras_is_refused_with_both_lists(
    bundle_copy: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    modality = dataset / "meta" / "modality.json"
    content = json.loads(modality.read_text())
    content["video"]["top"] = content["video"].pop("wrist")
    modality.write_text(json.dumps(content))
    assert _verify(bundle_copy, tiny_checkpoint, "--dataset", dataset) == 2
    error = capsys.readouterr().err
    assert "the bundle sees through the cameras front, wrist, but" in error
    assert "has front, top: name the dataset that the policy was trained on" in error


def test_verdict_is_printed_although_the_report_cannot_be_written(
    bundle_copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file in the folder's place also stops root, whom permissions do not.
    (bundle_copy / "reports").write_text("in the way")
    assert _verify(bundle_copy, tiny_checkpoint, "--samples", 1) == 2
    shown = capsys.readouterr()
    assert shown.out.rstrip().endswith("PASS")
    assert "cannot write" in shown.err
    assert "verify.json" in shown.err


@pytest.fixture
def deployed_copy(deployed_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed_bundle, tmp_path / "deployed"))


def test_deployed_bundle_passes_with_the_image_chain_apart(
    deployed_copy: Path, tiny_checkpoint: Path
) -> None:
    assert _verify(deployed_copy, tiny_checkpoint, "--samples", 2, "--atol", 1e-4) == 0
    report = _report(deployed_copy)
    assert set(report) - {""} == {CHAIN, HEAD, *FROM_PIXELS, *FROM_FRAMES}
    for name in (HEAD, *FROM_PIXELS):
        assert float(str(report[name]["relative_l2"])) < 1e-4
    assert float(str(report[CHAIN]["max_absolute"])) < 1.001


def _other_prefix(bundle: Path) -> None:
    for path in (bundle / "prompts").iterdir():
        prefix = read_prefix(path)
        keys = prefix.tensors["prefix_keys"]
        replace(prefix, tensors={**prefix.tensors, "prefix_keys": -keys}).write(path)


def _darken(weights: np.ndarray) -> None:  # type: ignore[type-arg]
    weights *= 0.5


@pytest.mark.parametrize(
    ("spoil", "failing"),
    [
        (
            lambda b: _spoil(
                b, "backbone.onnx", "image_chain.chains.480x640.bicubic.0.high", _darken
            ),
            {CHAIN},
        ),
        (_other_prefix, {*FROM_PIXELS, *FROM_FRAMES}),
        (
            lambda b: _spoil(b, "action_head.onnx", "context.image.kv", _negate),
            {HEAD, "action_pred, from recorded pixels", "action_pred, from frames"},
        ),
    ],
)
def test_wrong_part_of_a_deployed_bundle_fails_where_it_is(
    deployed_copy: Path,
    tiny_checkpoint: Path,
    reseal: Reseal,
    spoil: Callable[[Path], None],
    failing: set[str],
) -> None:
    spoil(deployed_copy)
    reseal(deployed_copy)
    assert _verify(deployed_copy, tiny_checkpoint, "--samples", 1, "--atol", 1e-4) == 1
    report = _report(deployed_copy)
    failed = {name for name in report if name and report[name]["passed"] is False}
    # A darker picture shows behind the chain as well, where frames are what is fed.
    assert failing <= failed <= (failing | FROM_FRAMES if CHAIN in failing else failing)


def test_observation_with_an_instruction_outside_the_bank_is_refused_with_the_command(
    deployed_copy: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    tasks = dataset / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("cube", "ball"))
    assert _verify(deployed_copy, tiny_checkpoint, "--dataset", dataset) == 2
    assert "groot-int8 add-instruction" in capsys.readouterr().err
