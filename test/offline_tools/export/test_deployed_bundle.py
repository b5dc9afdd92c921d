"""Hazards of exporting deployed graphs: a bank that is empty, too long, or of other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export needs torch")
pytest.importorskip("transformers", reason="the export needs transformers")

from groot_int8_ros.errors import ConfigurationError, ObservationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.preprocess import Preprocessor
from groot_int8_ros.policy.prompt_bank import read_prefix
from offline_tools.cli import main
from offline_tools.export.prompts import (
    Instructions,
    dataset_instructions,
    given_instructions,
    plan_layout,
)

_NEW = "open the door"


@pytest.fixture(scope="module")
def preprocessor(tiny_bundle: Path) -> Preprocessor:
    return open_bundle(tiny_bundle, verify_hashes=False).preprocessor()


def _layout(
    found: Instructions, preprocessor: Preprocessor, room: int | None = None, model: bool = False
) -> int:
    layout = plan_layout(found, preprocessor, max_prefix_tokens=room, prefix_model=model)
    return layout.prefix_length


def test_room_is_that_of_the_longest_instruction_rounded_up(preprocessor: Preprocessor) -> None:
    found = given_instructions(["go", "go to the table and wait there"], preprocessor)
    room = _layout(found, preprocessor)
    assert 0 <= room - found.longest < 8
    assert room % 8 == 0
    assert _layout(found, preprocessor, 77) == 77


def test_instruction_that_says_the_same_is_kept_once(preprocessor: Preprocessor) -> None:
    found = given_instructions(["Go home!", "go home", "go away"], preprocessor)
    assert found.texts == ("Go home!", "go away")


def test_bank_that_would_be_empty_is_refused(preprocessor: Preprocessor) -> None:
    nothing = given_instructions([], preprocessor)
    with pytest.raises(ConfigurationError, match=r"--instruction.*--dataset.*--prefix-model"):
        _layout(nothing, preprocessor)
    with pytest.raises(ConfigurationError, match="--max-prefix-tokens"):
        _layout(nothing, preprocessor, model=True)
    assert _layout(nothing, preprocessor, 40, model=True) == 40


def test_room_too_small_is_refused(preprocessor: Preprocessor) -> None:
    found = given_instructions(["go to the table"], preprocessor)
    with pytest.raises(ConfigurationError, match=rf"8 is less than the {found.longest} tokens"):
        _layout(found, preprocessor, 8)


def test_instruction_that_cannot_be_used_is_an_error_and_such_a_task_a_note(
    preprocessor: Preprocessor, tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ObservationError, match="is empty"):
        given_instructions(["..."], preprocessor)
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    with (dataset / "meta" / "tasks.jsonl").open("a") as stream:
        stream.write(json.dumps({"task_index": 99, "task": "..."}) + "\n")
    notes: list[str] = []
    tasks = dataset_instructions(dataset, preprocessor, notes.append)
    assert tasks.texts == dataset_instructions(tiny_dataset, preprocessor, notes.append).texts
    assert len(notes) == 1
    assert "'...' is left out" in notes[0]


@pytest.mark.parametrize(
    "option", [("--instruction", "go"), ("--max-prefix-tokens", "40"), ("--prefix-model",)]
)
def test_options_of_the_bank_are_refused_where_there_is_none(
    minimal_checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, ...],
) -> None:
    words = ["export", "--checkpoint", str(minimal_checkpoint), "--dataset", str(tiny_dataset)]
    words += ["--bundle", str(tmp_path / "bundle"), "--graphs", "reference", *option]
    assert main(words) == 2
    assert f"{option[0]} goes with --graphs deployed" in capsys.readouterr().err


@pytest.fixture
def copy(deployed_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed_bundle, tmp_path / "bundle"))


def _add(bundle: Path, *words: object) -> int:
    return main(["add-instruction", "--bundle", str(bundle), *map(str, words)])


def test_added_instruction_is_the_same_from_the_bundle_and_from_the_checkpoint(
    copy: Path,
    tiny_checkpoint: Path,
    deployed_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(deployed_bundle, tmp_path / "other"))
    assert _add(copy, _NEW, "Pick up the cube!") == 0
    assert "'Pick up the cube!' is in the bundle already" in capsys.readouterr().out
    assert _add(other, "--checkpoint", tiny_checkpoint, _NEW) == 0
    found = []
    for bundle in (copy, other):
        manifest = open_bundle(bundle).manifest  # every hash is right again
        assert manifest.prompts is not None
        record = manifest.prompts.instructions[-1]
        assert record.text == _NEW
        found.append(read_prefix(bundle / record.file))
        policy = Policy.load(bundle, threads=1)
        policy.check_instruction("Open the door.")
        policy.close()
    for name, tensor in found[0].tensors.items():
        np.testing.assert_allclose(found[1].tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_adding_from_another_checkpoint_is_refused(
    copy: Path, minimal_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "manifest.json").read_bytes()
    assert _add(copy, "--checkpoint", minimal_checkpoint, _NEW) == 2
    assert "exported from another checkpoint" in capsys.readouterr().err
    assert (copy / "manifest.json").read_bytes() == before


def test_adding_to_reference_graphs_is_refused(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _add(tiny_bundle, _NEW) == 2
    assert "take any instruction" in capsys.readouterr().err


def test_adding_without_any_weights_names_both_ways_out(
    write_small_deployed: Callable[..., Path],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = write_small_deployed(tmp_path / "small", tiny_bundle, prefix_model=False)
    assert _add(bundle, _NEW) == 2
    error = capsys.readouterr().err
    assert "--prefix-model" in error
    assert "--checkpoint CHECKPOINT" in error


def test_killed_addition_leaves_the_bundle_whole(
    small_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_tools.export import add_instruction

    manifest = open_bundle(small_copy).manifest

    class Killed(BaseException):
        pass

    def kill(path: Path) -> str:
        raise Killed

    # Between the prefix and the manifest that lists it.
    monkeypatch.setattr(add_instruction, "sha256_of_file", kill)
    with pytest.raises(Killed):
        _add(small_copy, _NEW)
    assert open_bundle(small_copy).manifest == manifest
