from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_tools.cli import main
from offline_tools.parity.boundaries import window_order

VISION = "backbone.model.vision_model.vision_model.encoder.layers.1.mlp.fc1.weight"
CONNECTOR = "backbone.model.mlp1.1.weight"
LANGUAGE = "backbone.model.language_model.model.layers.2.self_attn.k_proj.weight"
DIT = "action_head.model.transformer_blocks.2.attn1.to_v.weight"
STATE = "action_head.state_encoder.layer2.W"
DECODER = "action_head.action_decoder.layer1.b"


def parity(checkpoint: Path, golden: Path, tokenizer: Path, *more: str) -> int:
    return main(
        [
            "parity",
            f"--checkpoint={checkpoint}",
            f"--golden={golden}",
            f"--tokenizer={tokenizer}",
            *more,
        ]
    )


@pytest.mark.slow
def test_every_boundary_of_the_golden_set_holds(
    golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = parity(golden_dir / "checkpoint", golden_dir, golden_dir / "tokenizer")
    table = capsys.readouterr().out
    assert code == 0, table
    assert "0 failed" in table
    assert "no boundary is known" not in table
    # Nothing that was recorded goes uncompared but the yardsticks of lower precision.
    notes = re.findall(r"^note: (.*)$", table, flags=re.MULTILINE)
    assert all("is not recorded" in note or "golden_bf16" in note for note in notes), notes
    for recording in golden_dir.glob("golden_obs*.npz"):
        with np.load(recording) as arrays:
            compared = {name for name in arrays.files if f"  {name}" in table}
            inputs = {"instruction", "noise"}
            names = {n for n in arrays.files if not n.startswith(("image.", "state."))}
            assert names - compared <= inputs


@pytest.fixture
def small_golden(golden_dir: Path, tmp_path: Path) -> Path:
    """The second observation with a single denoising step."""
    folder = tmp_path / "golden"
    folder.mkdir()
    with np.load(golden_dir / "golden_obs1.npz") as stored:
        arrays = {
            name: stored[name] for name in stored.files if not name.startswith(("n2.", "n4."))
        }
    np.savez(folder / "golden_obs1.npz", **arrays)
    shutil.copy(golden_dir / "eagle_config.json", folder)
    return folder


def rewrite(golden: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = golden / "golden_obs1.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    change(arrays)
    np.savez(path, **arrays)


def writable_copy(golden_dir: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for file in (golden_dir / "checkpoint").iterdir():
        shutil.copyfile(file, copied / file.name)
    return copied


@pytest.mark.parametrize(
    ("key", "row", "broken", "whole"),
    [
        (VISION, ..., "vision_last_hidden_state", "mlp1_out"),
        (CONNECTOR, ..., "mlp1_out", "inputs_embeds"),
        (LANGUAGE, ..., "backbone_features", "vlln_out"),
        (DIT, ..., "n1.dit_out", "n1.velocity"),
        (STATE, 10, "state_features", "n1.sa_embs"),
        (DECODER, 10, "n1.velocity", "n1.dit_out"),
    ],
)
def test_a_changed_weight_fails_its_own_boundary_and_the_whole_but_no_other_stage(
    golden_dir: Path,
    small_golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    row: int,
    broken: str,
    whole: str,
) -> None:
    checkpoint = writable_copy(golden_dir, tmp_path)
    weights = load_file(str(checkpoint / "model.safetensors"))
    changed = weights[key].float()
    # Noise of a tenth of the usual weight, on one tensor or on one embodiment's row of it.
    noise = torch.randn(changed[row].shape, generator=torch.Generator().manual_seed(0))
    changed[row] += 0.1 * changed[row].abs().mean() * noise
    weights[key] = changed.to(torch.float32)
    save_file(weights, str(checkpoint / "model.safetensors"))
    assert parity(checkpoint, small_golden, golden_dir / "tokenizer") == 1
    verdicts = {
        match[1]: match[2]
        for match in re.finditer(
            r"^golden_obs1 +(.+?)  .*(ok|FAILED)", capsys.readouterr().out, flags=re.MULTILINE
        )
    }
    assert verdicts[broken] == "FAILED"
    assert verdicts[whole] == "ok"
    assert verdicts["n1.action_pred (end to end)"] == "FAILED"


def test_another_embodiments_weights_do_not_matter(
    golden_dir: Path, small_golden: Path, tmp_path: Path
) -> None:
    checkpoint = writable_copy(golden_dir, tmp_path)
    weights = load_file(str(checkpoint / "model.safetensors"))
    weights[STATE][:10] += 1
    weights[STATE][11:] += 1
    save_file(weights, str(checkpoint / "model.safetensors"))
    assert parity(checkpoint, small_golden, golden_dir / "tokenizer") == 0


def test_unknown_arrays_and_absent_files_are_said(
    golden_dir: Path, small_golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["n1.surprise"] = np.zeros(3)
        del arrays["mlp1_out"]

    rewrite(small_golden, change)
    np.savez(small_golden / "golden_other.npz", x=np.zeros(1))
    assert parity(golden_dir / "checkpoint", small_golden, golden_dir / "tokenizer") == 0
    table = capsys.readouterr().out
    assert "the array n1.surprise is recorded, but no boundary is known" in table
    assert "mlp1_out is not recorded" in table
    assert "inputs_embeds is not compared, its input mlp1_out is not recorded" in table
    assert "golden_norm.npz is not in the golden set" in table
    assert "golden_other.npz is of no known kind" in table


def test_a_wrong_token_fails(
    golden_dir: Path, small_golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["input_ids"][0, 20] += 1

    rewrite(small_golden, change)
    assert parity(golden_dir / "checkpoint", small_golden, golden_dir / "tokenizer") == 1
    assert "has to be equal: golden_obs1 input_ids" in capsys.readouterr().out


def test_a_prediction_that_is_not_finite_fails_instead_of_ending_the_run(
    golden_dir: Path, small_golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = writable_copy(golden_dir, tmp_path)
    weights = load_file(str(checkpoint / "model.safetensors"))
    weights[DECODER][10] = torch.inf
    save_file(weights, str(checkpoint / "model.safetensors"))
    assert parity(checkpoint, small_golden, golden_dir / "tokenizer") == 1
    assert "not finite" in capsys.readouterr().out


def _no_observation(golden: Path) -> None:
    (golden / "golden_obs1.npz").unlink()


def _cut_observation(golden: Path) -> None:
    path = golden / "golden_obs1.npz"
    path.write_bytes(path.read_bytes()[:5000])


def _no_instruction(golden: Path) -> None:
    rewrite(golden, lambda arrays: arrays.pop("instruction"))


def _other_embodiment(golden: Path) -> None:
    rewrite(golden, lambda arrays: arrays.update(embodiment_id=np.array([3])))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_observation, "holds no golden_obs"),
        (_cut_observation, "cannot be read as recorded arrays"),
        (_no_instruction, "holds no array 'instruction'"),
        (_other_embodiment, "embodiment row 3"),
    ],
)
def test_a_golden_set_that_cannot_be_used_is_explained(
    golden_dir: Path,
    small_golden: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(small_golden)
    assert parity(golden_dir / "checkpoint", small_golden, golden_dir / "tokenizer") == 2
    assert said in capsys.readouterr().err


def _refuse_the_tag(checkpoint: Path, recorded: bool) -> None:
    """Give the checkpoint an embodiment that is not implemented: the recorded one or a second."""
    path = checkpoint / "processor_config.json"
    config = json.loads(path.read_text())
    modalities = config["processor_kwargs"]["modality_configs"]
    (tag,) = modalities
    end_effector = json.loads(json.dumps(modalities[tag]))
    end_effector["video"]["delta_indices"] = [-1, 0]
    modalities["two_frames"] = end_effector if not recorded else modalities[tag]
    if recorded:
        modalities[tag] = end_effector
    path.write_text(json.dumps(config))
    path = checkpoint / "statistics.json"
    statistics = json.loads(path.read_text())
    statistics["two_frames"] = statistics[tag]
    path.write_text(json.dumps(statistics))
    path = checkpoint / "embodiment_id.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**ids, "two_frames": 3}))


@pytest.mark.parametrize("recorded", [False, True])
def test_embodiment_that_cannot_be_used_is_said_with_the_reason(
    golden_dir: Path,
    small_golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recorded: bool,
) -> None:
    checkpoint = writable_copy(golden_dir, tmp_path)
    (tag,) = json.loads((checkpoint / "processor_config.json").read_text())["processor_kwargs"][
        "modality_configs"
    ]
    _refuse_the_tag(checkpoint, recorded)
    code = parity(checkpoint, small_golden, golden_dir / "tokenizer")
    shown = capsys.readouterr()
    if recorded:
        assert code == 2
        assert "which the checkpoint does not describe" in shown.err
        assert f"\nNot usable: embodiment {tag!r}: {tag}.video" in shown.err
    else:
        assert code == 0
        assert "note: not usable: embodiment 'two_frames': two_frames.video" in shown.out


def test_an_eagle_config_of_other_sizes_is_refused(
    golden_dir: Path, small_golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eagle = json.loads((golden_dir / "eagle_config.json").read_text())
    eagle["vision_config"]["intermediate_size"] += 4
    path = tmp_path / "eagle.json"
    path.write_text(json.dumps(eagle))
    option = f"--eagle-config={path}"
    checkpoint = golden_dir / "checkpoint"
    assert parity(checkpoint, small_golden, golden_dir / "tokenizer", option) == 2
    assert "pass another --eagle-config" in capsys.readouterr().err


def test_window_order_visits_every_patch_once_and_cuts_windows_at_the_edge() -> None:
    shapes = np.array([[3, 5], [2, 2]])
    order = window_order(shapes, 2)
    assert sorted(order.tolist()) == list(range(19))
    # First window: rows 0-1, columns 0-1; third: the cut-off column 4; last: the second image.
    assert order[:4].tolist() == [0, 1, 5, 6]
    assert order[8:10].tolist() == [4, 9]
    assert order[-4:].tolist() == [15, 16, 17, 18]
