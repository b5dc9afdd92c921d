"""The executor's commitment on its way to the policy: a wrong row, unit, key or time."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("trajectory_msgs", reason="needs the ROS 2 Python packages")

from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.policy.robot import policy_to_joint
from groot_int8_ros.policy.types import JointSpec
from groot_int8_ros.ros.committed_rows import CommittedReader
from groot_int8_ros.ros.executor_messages import commitment_message

JOINTS = {
    "arm": (JointSpec("pan", "degrees", -1.0, 90.0), JointSpec("lift", "degrees")),
    "jaw": (JointSpec("jaw"),),
}
START_NS = 1_700_000_000_000_000_000
ROW_NS = 50_000_000
ROWS = 12


def plan(time_s: float) -> np.ndarray:
    """What the policy had said for a time, in its own units."""
    return np.array([90.0 + 10.0 * time_s, -5.0 * time_s, 0.3 + 0.1 * time_s])


def committed(until_row: int, names: tuple[str, ...] = ("jaw", "lift", "pan")) -> Commitment:
    """A commitment from half a second before the observation to one of its rows."""
    due_ns = START_NS + ROW_NS * np.arange(-10, until_row + 1, dtype=np.int64)
    rows = []
    for due in due_ns:
        values = plan((due - START_NS) * 1e-9)
        pan, lift = policy_to_joint(JOINTS["arm"], values[:2])
        rows.append({"pan": pan, "lift": lift, "jaw": values[2]})
    targets = np.array([[row[name] for name in names] for row in rows])
    return Commitment(START_NS, names, due_ns, targets)


def reader() -> CommittedReader:
    return CommittedReader(JOINTS, np.linspace(0.0, 0.05 * (ROWS - 1), ROWS))


@pytest.mark.parametrize("offset_ns", [0, 20_000_000, -137_000_000])
def test_rows_are_those_of_the_observation_in_the_policys_units(offset_ns: int) -> None:
    found = reader().read(commitment_message(committed(5)), START_NS + offset_ns)
    assert found is not None
    last = (5 * ROW_NS - offset_ns) // ROW_NS
    assert list(found.rows) == list(range(last + 1))
    times = (offset_ns + ROW_NS * np.array(found.rows)) * 1e-9
    wanted = np.array([plan(time) for time in times])
    np.testing.assert_allclose(found.actions["arm"], wanted[:, :2], rtol=1e-5)
    np.testing.assert_allclose(found.actions["jaw"], wanted[:, 2:], rtol=1e-5)
    assert found.actions["arm"].dtype == np.float32


@pytest.mark.parametrize(
    ("until", "names", "observation_ns"),
    [
        (5, ("lift", "pan"), START_NS),  # the jaw is missing
        (-1, ("jaw", "lift", "pan"), START_NS),  # over before the observation
        (20, ("jaw", "lift", "pan"), START_NS),  # longer than the chunk
        (5, ("jaw", "lift", "pan"), START_NS - 10**9),  # older than what is known
    ],
)
def test_a_commitment_that_does_not_fit_leaves_the_policy_free(
    until: int, names: tuple[str, ...], observation_ns: int
) -> None:
    assert reader().read(commitment_message(committed(until, names)), observation_ns) is None


def test_an_empty_commitment_leaves_the_policy_free() -> None:
    message = commitment_message(committed(5))
    message.points = []
    assert reader().read(message, START_NS) is None
