"""Which messages may be used together, and what is said of those that may not."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groot_int8_ros.ros.observation_buffer import (
    AHEAD,
    MISSING,
    SKEWED,
    STALE,
    UNSTAMPED,
    USED,
    Hold,
    ObservationBuffer,
    Snapshot,
    Stream,
)

FRONT = Stream("camera front", "/front", True)
WRIST = Stream("camera wrist", "/wrist", True)
JOINTS = Stream("joint_state", "/joint_states", False)
NOW = 1_700_000_000_000_000_000
MS = 1_000_000


def buffer() -> ObservationBuffer:
    return ObservationBuffer([FRONT, WRIST, JOINTS])


def fill(target: ObservationBuffer, front: int, wrist: int, joints: int) -> None:
    for stream, stamp in ((FRONT, front), (WRIST, wrist), (JOINTS, joints)):
        target.store(stream.name, f"{stream.name}@{stamp}", stamp)


def assemble(target: ObservationBuffer, now: int = NOW) -> Snapshot | Hold:
    return target.assemble(now, max_age_s=0.5, max_skew_s=0.1)


def held(found: Snapshot | Hold) -> Hold:
    assert isinstance(found, Hold)
    return found


def taken(found: Snapshot | Hold) -> Snapshot:
    assert isinstance(found, Snapshot), found
    return found


def test_stamp_is_the_newest_camera_and_not_the_newer_joint_state() -> None:
    target = buffer()
    fill(target, NOW - 40 * MS, NOW - 20 * MS, NOW)
    snapshot = taken(assemble(target))
    assert snapshot.stamp_ns == NOW - 20 * MS
    assert snapshot.samples["camera front"].message == f"camera front@{NOW - 40 * MS}"


def test_every_missing_stream_is_named_with_its_topic() -> None:
    target = buffer()
    target.store(WRIST.name, "", NOW)
    hold = held(assemble(target))
    assert hold.reason == MISSING
    assert "camera front (/front)" in hold.message
    assert "joint_state (/joint_states)" in hold.message
    assert "/wrist" not in hold.message


@pytest.mark.parametrize("stale", [FRONT, WRIST, JOINTS])
def test_the_stale_stream_is_the_one_named(stale: Stream) -> None:
    target = buffer()
    fill(target, NOW, NOW, NOW)
    later = NOW + 600 * MS
    for stream in {FRONT, WRIST, JOINTS} - {stale}:
        target.store(stream.name, "", later)
    hold = held(assemble(target, later))
    assert hold.reason == STALE
    assert stale.topic in hold.message
    assert "0.600 s" in hold.message
    assert sum(stream.topic in hold.message for stream in (FRONT, WRIST, JOINTS)) == 1


def test_age_and_skew_are_allowed_up_to_their_limits() -> None:
    target = buffer()
    fill(target, NOW - 500 * MS, NOW - 450 * MS, NOW - 400 * MS)
    taken(assemble(target))
    assert held(assemble(target, NOW + 1)).reason == STALE
    fill(target, NOW - 100 * MS - 1, NOW - 50 * MS, NOW)
    hold = held(assemble(target))
    assert hold.reason == SKEWED
    assert "/front" in hold.message
    assert "/joint_states" in hold.message


def test_a_stream_is_judged_by_its_own_age_and_named_with_its_own_parameter() -> None:
    strict = replace(WRIST, max_age_s=0.05, limits="cameras.wrist")
    patient = replace(JOINTS, max_age_s=2.0, max_skew_s=2.0, limits="joint_state")
    target = ObservationBuffer([FRONT, strict, patient])
    fill(target, NOW - 60 * MS, NOW - 50 * MS, NOW - 1_500 * MS)
    taken(assemble(target))
    hold = held(assemble(target, NOW + MS))
    assert hold.reason == STALE
    assert "/wrist" in hold.message
    assert "cameras.wrist.max_age_s = 0.05" in hold.message
    # Its age is also how far its stamp may lie ahead.
    fill(target, NOW, NOW + 60 * MS, NOW)
    assert held(assemble(target)).reason == AHEAD


def test_a_slow_stream_is_allowed_without_loosening_the_others() -> None:
    slow = replace(JOINTS, max_skew_s=0.4, limits="joint_state")
    tight = replace(WRIST, max_skew_s=0.02, limits="cameras.wrist")
    target = ObservationBuffer([FRONT, tight, slow])
    fill(target, NOW, NOW - 20 * MS, NOW - 400 * MS)
    taken(assemble(target))
    for front, wrist, joints, words in (
        (NOW, NOW, NOW - 401 * MS, "joint_state.max_skew_s = 0.4"),
        (NOW, NOW - 21 * MS, NOW, "cameras.wrist.max_skew_s = 0.02"),
    ):
        fill(target, front, wrist, joints)
        hold = held(assemble(target))
        assert hold.reason == SKEWED
        assert words in hold.message


def test_stamps_of_the_future_are_not_fresh() -> None:
    target = buffer()
    fill(target, NOW, NOW + 600 * MS, NOW)
    hold = held(assemble(target))
    assert hold.reason == AHEAD
    assert "/wrist" in hold.message
    assert "/front" not in hold.message


def test_clock_that_never_came_is_told_as_such() -> None:
    target = buffer()
    fill(target, NOW, NOW, NOW)
    assert "/clock" in held(assemble(target, 0)).message


def test_driver_without_stamps_is_refused() -> None:
    target = buffer()
    fill(target, NOW, NOW, 0)
    hold = held(assemble(target))
    assert hold.reason == UNSTAMPED
    assert "/joint_states" in hold.message


def test_a_frame_is_used_once_even_if_the_joint_state_is_new() -> None:
    target = buffer()
    fill(target, NOW, NOW - MS, NOW)
    target.mark_used(taken(assemble(target)))
    assert held(assemble(target)).reason == USED
    target.store(JOINTS.name, "", NOW + MS)
    assert held(assemble(target)).reason == USED
    target.store(WRIST.name, "", NOW + 2 * MS)
    assert taken(assemble(target)).stamp_ns == NOW + 2 * MS


def test_second_pass_of_a_bag_never_meets_frames_of_the_first() -> None:
    target = buffer()
    first = NOW + 3_000 * MS
    fill(target, first, first, first)
    target.mark_used(taken(assemble(target, first)))
    target.store(FRONT.name, "", NOW)
    hold = held(assemble(target, NOW))
    assert hold.reason == MISSING
    assert "/wrist" in hold.message
    assert "/joint_states" in hold.message
    fill(target, NOW, NOW, NOW)
    assert taken(assemble(target, NOW)).epoch == 1


def test_same_stamps_may_be_used_again_after_time_jumped_back() -> None:
    target = buffer()
    fill(target, NOW, NOW, NOW)
    old = taken(assemble(target))
    target.mark_used(old)
    target.clear()
    assert held(assemble(target)).reason == MISSING
    fill(target, NOW, NOW, NOW)
    # A worker that is still busy with the first pass must not spoil the second.
    target.mark_used(old)
    assert taken(assemble(target)).epoch == target.epoch == 1


def test_reordered_message_is_no_jump() -> None:
    target = buffer()
    fill(target, NOW, NOW, NOW)
    target.store(FRONT.name, "late", NOW - 30 * MS)
    snapshot = taken(assemble(target))
    assert snapshot.epoch == 0
    assert snapshot.samples[FRONT.name].message == "late"


def test_wait_ends_with_a_message_and_with_a_wake() -> None:
    target = buffer()
    version = target.wait(-1, 0.0)
    for act in (lambda: target.store(FRONT.name, "", NOW), target.wake):
        thread = threading.Timer(0.05, act)
        thread.start()
        after = target.wait(version, 60.0)
        thread.join()
        assert after != version
        version = after
    assert target.wait(version, 0.0) == version


def test_status_tells_streams_that_came_from_those_that_never_did() -> None:
    target = buffer()
    target.store(FRONT.name, "", NOW)
    target.store(FRONT.name, "", NOW + MS)
    front, wrist, _ = target.status()
    assert (front.count, front.stamp_ns) == (2, NOW + MS)
    assert front.silence_s is not None
    assert (wrist.count, wrist.stamp_ns, wrist.silence_s) == (0, None, None)


def two_ticks(target: ObservationBuffer, wrist_after: int) -> None:
    """Two frames of each camera at 30 Hz, the wrist's somewhat later than the front's."""
    for tick in (NOW, NOW + 33 * MS):
        fill(target, tick, tick + wrist_after, tick)


@pytest.mark.parametrize("wrist_after", [0, 5 * MS])
def test_frames_of_one_moment_are_gathered_though_they_arrive_one_after_the_other(
    wrist_after: int,
) -> None:
    target = buffer()
    two_ticks(target, wrist_after)
    moment = NOW + 66 * MS
    target.store(FRONT.name, "", moment)
    thread = threading.Timer(0.05, target.store, (WRIST.name, "", moment + wrist_after))
    thread.start()
    target.wait_for_others(60.0)
    thread.join()
    assert taken(assemble(target, moment)).samples[WRIST.name].stamp_ns == moment + wrist_after


def test_a_lost_frame_is_not_waited_for_longer_than_allowed() -> None:
    target = buffer()
    two_ticks(target, 0)
    target.store(FRONT.name, "", NOW + 66 * MS)
    # Long enough that a busy machine's own delays are not taken for a wait.
    time.sleep(1.0)
    start = time.monotonic()
    # Counted from the newest frame's arrival.
    target.wait_for_others(1.0)
    assert time.monotonic() - start < 1.0
    target.wait_for_others(1.1)
    assert taken(assemble(target, NOW + 66 * MS)).samples[WRIST.name].stamp_ns == NOW + 33 * MS


def test_a_dead_camera_is_not_waited_for_as_long_as_the_others_go_on() -> None:
    target = buffer()
    two_ticks(target, 0)
    moment = NOW + 66 * MS
    target.store(FRONT.name, "", moment)
    thread = threading.Thread(target=target.wait_for_others, args=(0.5,))
    thread.start()
    give_up_s = time.monotonic() + 20.0
    while thread.is_alive() and time.monotonic() < give_up_s:
        moment += 33 * MS
        target.store(FRONT.name, "", moment)
        thread.join(0.002)
    ended = not thread.is_alive()
    thread.join()
    assert ended


@pytest.mark.parametrize("wrist_after", [15 * MS, 24 * MS])
def test_cameras_that_fire_apart_do_not_wait_for_each_other(wrist_after: int) -> None:
    start = time.monotonic()
    target = buffer()
    target.wait_for_others(60.0)
    fill(target, NOW - 300 * MS, NOW - 400 * MS, NOW)  # no camera's period is known yet
    target.wait_for_others(60.0)
    target = buffer()
    two_ticks(target, wrist_after)
    target.wait_for_others(60.0)
    target.store(FRONT.name, "", NOW + 66 * MS)
    target.wait_for_others(60.0)
    target.store(JOINTS.name, "", NOW + 400 * MS)
    target.wait_for_others(60.0)
    assert time.monotonic() - start < 60.0


_STREAMS = (
    Stream("camera a", "/a", True),
    Stream("camera b", "/b", True, 0.2, 0.3, "cameras.b"),
    Stream("joint_state", "/joints", False, None, 0.02, "joint_state"),
)
_EVENTS = st.lists(
    st.one_of(
        # A message of a stream: its stamp in milliseconds from now, whatever it may be.
        st.tuples(
            st.sampled_from([stream.name for stream in _STREAMS]),
            st.integers(-2000, 300) | st.sampled_from([0, -20, -21, -100, -101, -(10**7), 10**7]),
        ),
        # Time goes on, stands still or jumps.
        st.tuples(st.just("time"), st.integers(0, 60) | st.sampled_from([-3000, 5000])),
        st.tuples(st.just("cleared"), st.just(0)),
        st.tuples(st.just("unstamped"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(_EVENTS)
def test_whatever_comes_an_observation_is_fresh_together_and_new(
    events: list[tuple[str, int]],
) -> None:
    buffer = ObservationBuffer(_STREAMS)
    max_age_s, max_skew_s = 0.5, 0.1
    now_ns, epoch = 10**13, 0
    used: set[tuple[int, int]] = set()
    for what, value in events:
        if what == "time":
            now_ns += value * 10**6
        elif what == "cleared":
            buffer.clear()
        else:
            name = _STREAMS[0].name if what == "unstamped" else what
            stamp_ns = 0 if what == "unstamped" else now_ns + value * 10**6
            buffer.store(name, (name, buffer.epoch, stamp_ns), stamp_ns)
        assert buffer.epoch >= epoch
        epoch = buffer.epoch
        found = buffer.assemble(now_ns, max_age_s, max_skew_s)
        if isinstance(found, Hold):
            assert found.message
            continue
        stamps = {name: sample.stamp_ns for name, sample in found.samples.items()}
        assert set(stamps) == {stream.name for stream in _STREAMS}
        for stream in _STREAMS:
            age_s = (now_ns - stamps[stream.name]) / 1e9
            assert abs(age_s) <= (stream.max_age_s or max_age_s) + 1e-9
        for one, other in combinations(_STREAMS, 2):
            own = [s.max_skew_s for s in (one, other) if s.max_skew_s is not None]
            skew_s = abs(stamps[one.name] - stamps[other.name]) / 1e9
            assert skew_s <= max(own, default=max_skew_s) + 1e-9
        # Of one pass of the clock, each with the stamp that it came with, and never twice.
        for name, sample in found.samples.items():
            assert sample.message[0] == name
            assert sample.message[2] == sample.stamp_ns
        assert found.stamp_ns == max(stamps["camera a"], stamps["camera b"])
        assert (found.epoch, found.stamp_ns) not in used
        used.add((found.epoch, found.stamp_ns))
        buffer.mark_used(found)
        assert buffer.assemble(now_ns, max_age_s, max_skew_s) == Hold(
            USED, "no new camera frame since the last chunk"
        )


def test_a_frame_that_comes_again_after_a_reordered_one_is_not_used_twice() -> None:
    target = buffer()
    for stamp in (NOW, NOW - 20 * MS, NOW):
        fill(target, stamp, stamp, stamp)
        found = assemble(target)
        if isinstance(found, Snapshot):
            assert stamp == NOW
            target.mark_used(found)
    assert assemble(target) == Hold(USED, "no new camera frame since the last chunk")
