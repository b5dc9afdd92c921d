"""Hazards of a bank of instructions: the wrong prefix, padded wrong, or of another checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.errors import BundleError, ObservationError, UnknownInstructionError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.prefix_model import PrefixProcess, compute_prefix
from groot_int8_ros.policy.prompt_bank import (
    PromptBank,
    PromptPrefix,
    PromptRecord,
    PromptRecords,
    read_prefix,
)

Reseal = Callable[[Path], None]


@pytest.fixture
def graphs(small_deployed: Path) -> DeployedGraphs:
    return DeployedGraphs(open_bundle(small_deployed), {})


def _file(bundle: Path) -> Path:
    return bundle / open_bundle(bundle).manifest.prompts.instructions[0].file  # type: ignore[union-attr]


def _changed(bundle: Path, reseal: Reseal, **changes: Any) -> None:
    path = _file(bundle)
    replace(read_prefix(path), **changes).write(path)
    reseal(bundle)


def test_prefix_stands_at_the_right_end_and_the_mask_says_where(
    small_deployed: Path, graphs: DeployedGraphs
) -> None:
    prefix = read_prefix(_file(small_deployed))
    feeds = graphs.bank.feeds(prefix.input_ids)
    length, tokens = feeds["prefix_mask"].size, prefix.input_ids.size
    assert 0 < tokens < length
    assert feeds["prefix_mask"].tolist() == [False] * (length - tokens) + [True] * tokens
    for name, tensor in prefix.tensors.items():
        np.testing.assert_array_equal(feeds[name][:, :, length - tokens :], tensor)
        assert not feeds[name][:, :, : length - tokens].any()
    assert prefix.first_position == length - tokens


def test_instructions_that_the_processor_cannot_tell_apart_share_a_prefix(
    graphs: DeployedGraphs,
) -> None:
    plain, shouted = (
        graphs.bank.feeds(graphs.prefix_ids(text))
        for text in ("pick up the cube", "Pick up the CUBE!")
    )
    assert plain["prefix_keys"] is shouted["prefix_keys"]
    other = graphs.bank.feeds(graphs.prefix_ids("put it down"))
    assert not np.array_equal(plain["prefix_keys"], other["prefix_keys"])


def test_arrays_of_the_bank_cannot_be_changed_by_accident(graphs: DeployedGraphs) -> None:
    feeds = graphs.bank.feeds(graphs.prefix_ids("put it down"))
    with pytest.raises(ValueError, match="read-only"):
        feeds["prefix_keys"][0] = 1


def test_unknown_instruction_names_the_known_ones_and_the_command(
    graphs: DeployedGraphs, small_deployed: Path
) -> None:
    with pytest.raises(
        UnknownInstructionError,
        match=rf"'pick up the cube'; 'put it down'\..*add-instruction --bundle {small_deployed}",
    ):
        graphs.check_instruction("open the door")


def test_without_a_prefix_model_the_refusal_says_that_nothing_will_come(
    write_small_deployed: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = write_small_deployed(tmp_path / "bundle", tiny_bundle, prefix_model=False)
    policy = Policy.load(bundle, threads=1)
    with pytest.raises(UnknownInstructionError, match="exported without --prefix-model"):
        policy.check_instruction("open the door")
    policy.close()
    with pytest.raises(BundleError, match=r"no prefix model.*--checkpoint CHECKPOINT"):
        compute_prefix(open_bundle(bundle), "open the door")


def test_instruction_longer_than_the_graphs_room_is_refused_with_the_option(
    graphs: DeployedGraphs, small_deployed: Path
) -> None:
    text = " ".join(f"step {n}" for n in range(30))
    tokens = graphs.prefix_ids(text).size
    with pytest.raises(ObservationError, match=rf"has {tokens} tokens.*--max-prefix-tokens") as e:
        graphs.check_instruction(text)
    assert not isinstance(e.value, UnknownInstructionError)
    # Where it could be computed, too.
    with pytest.raises(ObservationError, match="--max-prefix-tokens"):
        compute_prefix(open_bundle(small_deployed), text)


_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another checkpoint": ({"checkpoint_sha256": "ab" * 32}, "computed with the checkpoint abab"),
    "another room": ({"first_position": 3}, "ends at position"),
    "another text": ({"input_ids": None}, "another text or tokenizer"),
    "another model": ({"tensors": None}, "does not fit the graph's"),
}


@pytest.mark.parametrize("lie", _LIES)
def test_prefix_that_belongs_elsewhere_is_refused_by_name(
    small_copy: Path, reseal: Reseal, lie: str
) -> None:
    changes, message = _LIES[lie]
    prefix = read_prefix(_file(small_copy))
    if "input_ids" in changes:
        changes = {"input_ids": prefix.input_ids[::-1].copy()}
    if "tensors" in changes:
        wider = np.repeat(prefix.tensors["prefix_keys"], 2, axis=1)
        changes = {"tensors": {**prefix.tensors, "prefix_keys": wider}}
    _changed(small_copy, reseal, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        Policy.load(small_copy)
    assert f"groot-int8 add-instruction --bundle {small_copy}" in str(caught.value)
    assert f"export --checkpoint CHECKPOINT --bundle {small_copy}" in str(caught.value)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: np.savez(path, input_ids=np.zeros(3, np.int64)),
        lambda path: np.savez(path, np.array([{}], dtype=object)),
    ],
)
def test_damaged_prefix_is_refused_and_nothing_in_it_is_run(
    small_copy: Path, reseal: Reseal, harm: Callable[[Path], object]
) -> None:
    path = _file(small_copy)
    harm(path)
    reseal(small_copy)
    with pytest.raises(BundleError, match=path.name):
        Policy.load(small_copy)


def test_prefix_with_nan_is_refused(small_copy: Path, reseal: Reseal) -> None:
    path = _file(small_copy)
    prefix = read_prefix(path)
    broken = {**prefix.tensors, "prefix_values": prefix.tensors["prefix_values"] * np.nan}
    replace(prefix, tensors=broken).write(path)
    reseal(small_copy)
    with pytest.raises(BundleError, match="prefix_values holds NaN"):
        Policy.load(small_copy)


def _bank(folder: Path, graphs: DeployedGraphs, prefixes: list[PromptPrefix]) -> PromptBank:
    (folder / "prompts").mkdir()
    for prefix in prefixes:
        prefix.write(folder / prefix.file)
    ids = {prefix.file: prefix.input_ids for prefix in prefixes}
    length = prefixes[0].first_position + prefixes[0].input_ids.size
    records = tuple(PromptRecord(file, file, len(own)) for file, own in ids.items())
    return PromptBank(
        folder,
        PromptRecords(length, records),
        checkpoint_sha256=prefixes[0].checkpoint_sha256,
        specs=graphs.bank._specs,
        has_prefix_model=True,
        encode=ids.__getitem__,
        make_again="",
    )


def test_what_the_robot_computed_outlives_what_can_be_read_again_and_memory_is_bounded(
    small_deployed: Path, graphs: DeployedGraphs, tmp_path: Path
) -> None:
    first = read_prefix(_file(small_deployed))

    def made(number: int) -> PromptPrefix:
        return replace(first, input_ids=first.input_ids + number)

    filed, computed = [made(n) for n in range(12)], [made(n) for n in range(12, 45)]
    bank = _bank(tmp_path, graphs, filed)
    bank.add(computed[0])
    kept = bank.feeds(computed[0].input_ids)
    for prefix in filed:
        bank.feeds(prefix.input_ids)
    assert bank.feeds(computed[0].input_ids) is kept
    for prefix in computed[1:32]:
        bank.add(prefix)
    assert all(bank.knows(prefix.input_ids) for prefix in computed[:32])
    # Used a moment ago, so another one makes room.
    bank.feeds(computed[0].input_ids)
    bank.add(computed[32])
    known = [bank.knows(prefix.input_ids) for prefix in (*filed, *computed)]
    assert known == [True] * (12 + 1) + [False] + [True] * 31
    assert len(bank._of_files) + len(bank._computed) == 8 + 32


@pytest.fixture
def policy(small_deployed: Path) -> Iterator[Policy]:
    loaded = Policy.load(small_deployed, threads=1)
    yield loaded
    loaded.close()


def _wait(process: PrefixProcess) -> PromptPrefix:
    while (found := process.result()) is None:
        process._process.wait(60)
    return found


def test_process_gives_what_the_model_gives_here(policy: Policy, small_deployed: Path) -> None:
    text = "open the door"
    process = PrefixProcess(small_deployed, text, threads=1)
    found = _wait(process)
    process.close()
    expected = compute_prefix(open_bundle(small_deployed), text, threads=1)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
    policy.add_prefix(found)
    policy.check_instruction("Open the door.")


def test_prefix_of_another_checkpoint_is_not_taken_in(
    policy: Policy, small_deployed: Path
) -> None:
    computed = compute_prefix(open_bundle(small_deployed), "open the door", threads=1)
    with pytest.raises(BundleError, match="computed with the checkpoint"):
        policy.add_prefix(replace(computed, checkpoint_sha256="00" * 32))
    with pytest.raises(UnknownInstructionError):
        policy.check_instruction("open the door")


def test_process_that_fails_says_why_in_one_line(small_copy: Path) -> None:
    (small_copy / "onnx" / "prefix.onnx").write_bytes(b"\0" * 2000)
    manifest = json.loads((small_copy / "manifest.json").read_text())
    manifest["files"]["onnx/prefix.onnx"]["bytes"] = 2000
    (small_copy / "manifest.json").write_text(json.dumps(manifest))
    process = PrefixProcess(small_copy, "open the door", threads=1)
    with pytest.raises(Exception, match=r"could not be computed: ONNX Runtime cannot load"):
        _wait(process)
    process.close()


def test_process_that_was_killed_for_want_of_memory_is_reported(small_deployed: Path) -> None:
    process = PrefixProcess(small_deployed, "open the door", threads=1)
    process._process.kill()
    process._process.wait(60)
    with pytest.raises(Exception, match="killed by signal 9; the kernel does so where memory"):
        process.result()
    process.close()


def test_closing_ends_the_process(small_deployed: Path) -> None:
    process = PrefixProcess(small_deployed, "open the door", threads=1)
    process.close()
    assert process._process.poll() is not None


def test_bank_without_instructions_and_without_model_is_no_bundle(small_copy: Path) -> None:
    manifest = json.loads((small_copy / "manifest.json").read_text())
    manifest["prompts"]["instructions"] = []
    (small_copy / "manifest.json").write_text(json.dumps(manifest))
    policy = Policy.load(small_copy, threads=1)
    policy.warm_up("anything")  # on a prefix without tokens
    policy.close()
    del manifest["graphs"]["prefix"]
    (small_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="neither an instruction nor a prefix model"):
        open_bundle(small_copy)
    shutil.rmtree(small_copy)
