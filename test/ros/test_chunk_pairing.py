"""Hazards of pairing: a chunk with frames that are not its own, memory without end, a hang."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from groot_int8_ros.ros import chunk_pairing
from groot_int8_ros.ros.chunk_pairing import ChunkPairing
from groot_int8_ros.ros.observation_buffer import Stream

STREAMS = (Stream("camera a", "/a", True), Stream("joint_state", "/j", False))
FRAME_BYTES = 10_000


def message(label: str, size: int = FRAME_BYTES) -> Any:
    return SimpleNamespace(label=label, data=bytes(size))


def info(stamp: int, joints: int, **changes: object) -> dict[str, object]:
    content: dict[str, object] = {
        "stamp_ns": stamp,
        "seed": 7,
        "instruction": "pick",
        "committed": None,
        "streams": {"camera a": {"stamp_ns": stamp}, "joint_state": {"stamp_ns": joints}},
    }
    return content | changes


@pytest.fixture
def pairing() -> ChunkPairing:
    return ChunkPairing(STREAMS, history_bytes=1 << 20)


def see(pairing: ChunkPairing, stamp: int, joints: int) -> None:
    pairing.seen("camera a", message(f"frame {stamp}"), stamp)
    pairing.seen("joint_state", message(f"joints {joints}"), joints)


def test_chunk_gets_the_messages_of_its_stamps_and_not_the_newest(pairing: ChunkPairing) -> None:
    for stamp in (100, 200, 300):
        see(pairing, stamp, stamp - 5)
    pairing.on_chunk(200, "chunk")
    assert pairing.next(0.0) is None
    pairing.on_info(info(200, 195))
    found = pairing.next(0.0)
    assert found is not None
    assert (found.chunk, found.seed, found.instruction) == ("chunk", 7, "pick")
    assert found.snapshot.stamp_ns == 200
    labels = {name: sample.message.label for name, sample in found.snapshot.samples.items()}
    assert labels == {"camera a": "frame 200", "joint_state": "joints 195"}
    assert found.committed is None
    assert pairing.next(0.0) is None, "a chunk was paired twice"
    rows = {"rows": [0], "actions": {"arm": [[0.5]]}}
    pairing.on_chunk(300, "next chunk")
    pairing.on_info(info(300, 295, committed=rows))
    found = pairing.next(0.0)
    assert found is not None
    assert found.committed == rows


def test_info_before_its_chunk_and_frames_after_both_are_waited_for(
    pairing: ChunkPairing,
) -> None:
    pairing.on_info(info(100, 95))
    pairing.on_chunk(100, "late")
    timer = threading.Timer(0.1, see, (pairing, 100, 95))
    timer.start()
    found = pairing.next(30.0)
    timer.join()
    assert found is not None
    assert found.chunk == "late"


def test_chunk_whose_frame_never_came_is_given_up_and_holds_no_other_up(
    pairing: ChunkPairing, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stamp in (100, 200):
        pairing.on_chunk(stamp, f"chunk {stamp}")
        pairing.on_info(info(stamp, stamp))
    see(pairing, 200, 200)
    found = pairing.next(0.0)
    assert found is not None
    assert found.chunk == "chunk 200"
    assert pairing.lost == 0
    monkeypatch.setattr(chunk_pairing, "PATIENCE_S", 0.0)
    assert pairing.next(0.0) is None
    assert pairing.lost == 1


def test_history_is_limited_in_bytes_and_the_oldest_goes_first() -> None:
    pairing = ChunkPairing(STREAMS, history_bytes=10 * (FRAME_BYTES + 2048))
    for stamp in range(100, 200):
        pairing.seen("camera a", message(f"frame {stamp}"), stamp)
    assert len(pairing._messages) == 10
    pairing.seen("camera a", message("again"), 199)
    assert len(pairing._messages) == 10
    assert pairing._bytes == 10 * (FRAME_BYTES + 2048)
    pairing.seen("joint_state", message("joints", 0), 195)
    pairing.on_chunk(195, "chunk")
    pairing.on_info(info(195, 195))
    assert pairing.next(0.0) is not None


def test_halves_without_their_other_half_do_not_pile_up(pairing: ChunkPairing) -> None:
    for stamp in range(1000):
        pairing.on_chunk(stamp, "chunk")
        pairing.on_info(info(10_000 + stamp, 0))
    assert len(pairing._chunks) <= 100
    assert len(pairing._infos) <= 100
    assert pairing.lost == 1800


def test_nothing_from_before_a_time_jump_is_paired_after_it(pairing: ChunkPairing) -> None:
    see(pairing, 100, 100)
    pairing.on_chunk(100, "old")
    pairing.clear()
    pairing.on_info(info(100, 100))
    see(pairing, 100, 100)
    assert pairing.next(0.0) is None


@pytest.mark.parametrize(
    ("content", "message_part"),
    [
        ("not json", "not that of a policy node"),
        ({"stamp_ns": 1}, "not that of a policy node"),
        (info(1, 1, seed="x"), "not of the types"),
        (
            {name: value for name, value in info(1, 1).items() if name != "committed"},
            "does not say whether rows of its chunk were committed",
        ),
        (info(1, 1, streams={"camera b": {"stamp_ns": 1}}), "camera b.*runs another bundle"),
    ],
)
def test_foreign_chunk_info_is_told_and_survived(
    pairing: ChunkPairing, content: object, message_part: str
) -> None:
    pairing.on_info(content)
    assert re.search(message_part, pairing.foreign)
    see(pairing, 100, 100)
    pairing.on_chunk(100, "chunk")
    pairing.on_info(info(100, 100))
    assert pairing.foreign == ""
    assert pairing.next(0.0) is not None
