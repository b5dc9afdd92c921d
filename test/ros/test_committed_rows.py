"""The executor's commitment on its way to the policy: a wrong row, unit, key or time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("trajectory_msgs", reason="needs the ROS 2 Python packages")

from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.errors import ObservationError
from groot_int8_ros.policy.robot import policy_to_joint
from groot_int8_ros.policy.types import CommittedActions, JointSpec
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
    ("until", "observation_ns"),
    [
        (-1, START_NS),  # over before the observation
        (5, START_NS - 10**9),  # the observation is older than what is known
    ],
)
def test_a_commitment_for_another_time_leaves_the_policy_free(
    until: int, observation_ns: int
) -> None:
    assert reader().read(commitment_message(committed(until)), observation_ns) is None


def _empty(message: JointTrajectory) -> None:
    message.points = []


def _not_a_number(message: JointTrajectory) -> None:
    message.points[2].positions = [0.0, math.nan, 0.0]


def _backward(message: JointTrajectory) -> None:
    message.points = list(reversed(message.points))


def _ragged(message: JointTrajectory) -> None:
    message.points[1].positions = [0.0]


@pytest.mark.parametrize(
    ("until", "names", "spoil", "said"),
    [
        (5, ("lift", "pan"), None, "lacks jaw"),
        (20, ("jaw", "lift", "pan"), None, "covers all 12 rows"),
        (5, ("jaw", "lift", "pan"), _empty, "0 rows"),
        (5, ("jaw", "lift", "pan"), _not_a_number, "lift are not finite"),
        (5, ("jaw", "lift", "pan"), _backward, "do not increase"),
        (5, ("jaw", "lift", "pan"), _ragged, "targets of shape"),
    ],
)
def test_a_commitment_that_cannot_be_used_says_why(
    until: int,
    names: tuple[str, ...],
    spoil: Callable[[JointTrajectory], None] | None,
    said: str,
) -> None:
    message = commitment_message(committed(until, names))
    if spoil:
        spoil(message)
    with pytest.raises(ObservationError, match=said):
        reader().read(message, START_NS)


def test_rows_return_from_json_to_the_bit() -> None:
    found = reader().read(commitment_message(committed(5)), START_NS)
    assert found is not None
    again = CommittedActions.from_dict(json.loads(json.dumps(found.to_dict())))
    assert list(again.rows) == list(found.rows)
    for key, values in found.actions.items():
        np.testing.assert_array_equal(again.actions[key], values)
        assert again.actions[key].dtype == np.float32
