"""Joint names, units and order; chunks as trajectories."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from sensor_msgs.msg import JointState

from groot_int8_ros.errors import ConfigurationError, EngineError, ObservationError
from groot_int8_ros.policy.types import ActionChunk, JointSpec
from groot_int8_ros.ros.joints import (
    JointStateReader,
    TrajectoryReader,
    TrajectoryWriter,
    stamp_ns,
)

ARM = (
    JointSpec("pan", "degrees", -1.0, 90.0),
    JointSpec("lift", "radians", 1.0, 0.5),
)
GRIPPER = (JointSpec("jaw", "raw", 1.0, 0.0),)
JOINTS = {"arm": ARM, "gripper": GRIPPER}
POSITIONS = {"wheel": 9.0, "jaw": 0.04, "lift": -0.25, "pan": math.pi / 6}


def message(positions: dict[str, float]) -> JointState:
    return JointState(name=list(positions), position=list(positions.values()))


def reader() -> JointStateReader:
    return JointStateReader(JOINTS, "/joint_states")


def test_names_decide_and_not_their_order() -> None:
    joints = reader()
    orders = [list(POSITIONS), sorted(POSITIONS), sorted(POSITIONS, reverse=True)]
    for names in [*orders, *orders]:  # the second round meets a cache of another order
        state = joints.read(message({name: POSITIONS[name] for name in names}))
        np.testing.assert_allclose(state["arm"], [-30.0 + 90.0, -0.25 + 0.5], rtol=1e-6)
        np.testing.assert_allclose(state["gripper"], [0.04], rtol=1e-6)
        assert all(values.dtype == np.float32 for values in state.values())


def test_values_follow_their_names_when_a_driver_changes_its_order() -> None:
    joints = reader()
    joints.read(JointState(name=["pan", "lift", "jaw"], position=[0.0, 1.0, 2.0]))
    state = joints.read(JointState(name=["jaw", "lift", "pan"], position=[2.0, 1.0, 0.0]))
    np.testing.assert_allclose(state["gripper"], [2.0])
    np.testing.assert_allclose(state["arm"], [90.0, 1.5])


def test_missing_joints_are_all_named() -> None:
    with pytest.raises(ObservationError, match="missing pan, jaw") as caught:
        reader().read(message({"wheel": 1.0, "lift": 0.0}))
    assert "/joint_states" in str(caught.value)


def test_a_joint_lost_later_is_noticed() -> None:
    joints = reader()
    joints.read(message(POSITIONS))
    with pytest.raises(ObservationError, match="missing jaw"):
        joints.read(message({"lift": 0.0, "pan": 0.0}))
    joints.read(message(POSITIONS))


def test_empty_message_is_refused() -> None:
    with pytest.raises(ObservationError, match="no names"):
        reader().read(JointState())


def test_joint_named_twice_is_refused() -> None:
    names = ["pan", "lift", "jaw", "pan"]
    with pytest.raises(ObservationError, match="more than once: pan"):
        reader().read(JointState(name=names, position=[0.0] * 4))


@pytest.mark.parametrize("positions", [[], [0.0, 1.0], [0.0] * 4])
def test_positions_that_do_not_match_the_names_are_refused(positions: list[float]) -> None:
    joints = reader()
    joints.read(JointState(name=["pan", "lift", "jaw"], position=[0.0] * 3))
    with pytest.raises(ObservationError, match=f"3 names but {len(positions)} positions"):
        joints.read(JointState(name=["pan", "lift", "jaw"], position=positions))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_value_that_is_not_finite_names_its_joint(value: float) -> None:
    with pytest.raises(ObservationError, match="position of lift is not"):
        reader().read(message({**POSITIONS, "lift": value}))


def test_unused_joint_may_be_nan() -> None:
    reader().read(message({**POSITIONS, "wheel": math.nan}))


def chunk(arm: np.ndarray, gripper: np.ndarray, times: list[float]) -> ActionChunk:
    return ActionChunk(
        actions={"gripper": gripper.astype(np.float32), "arm": arm.astype(np.float32)},
        stamp_ns=12_345_678_901_234_567,
        time_from_start_s=np.array(times),
        action_pred=np.zeros((len(times), 3), np.float32),
        seed=0,
    )


def test_trajectory_undoes_the_mapping_of_the_state() -> None:
    positions = np.random.default_rng(3).uniform(-2, 2, (4, 3))
    joints = reader()
    states = [
        joints.read(JointState(name=["pan", "lift", "jaw"], position=row.tolist()))
        for row in positions
    ]
    trajectory = TrajectoryWriter(JOINTS).write(
        chunk(
            np.array([state["arm"] for state in states]),
            np.array([state["gripper"] for state in states]),
            [0.0, 1 / 30, 2 / 30, 4 / 30],
        )
    )
    assert trajectory.joint_names == ["pan", "lift", "jaw"]
    assert stamp_ns(trajectory.header) == 12_345_678_901_234_567
    np.testing.assert_allclose(
        [list(point.positions) for point in trajectory.points], positions, atol=1e-6
    )
    times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in trajectory.points]
    np.testing.assert_allclose(times, [0.0, 1 / 30, 2 / 30, 4 / 30], atol=1e-9)


def test_published_trajectory_is_read_back_whatever_the_order_of_its_joints() -> None:
    random = np.random.default_rng(4)
    arm, gripper = random.uniform(-2, 2, (3, 2)), random.uniform(-2, 2, (3, 1))
    trajectory = TrajectoryWriter(JOINTS).write(chunk(arm, gripper, [0.0, 0.1, 0.2]))
    trajectory.joint_names = ["jaw", "pan", "lift"]
    for point in trajectory.points:
        pan, lift, jaw = point.positions
        point.positions = [jaw, pan, lift]
    actions = TrajectoryReader(JOINTS, "/chunk").read(trajectory)
    np.testing.assert_allclose(actions["arm"], arm, atol=1e-5)
    np.testing.assert_allclose(actions["gripper"], gripper, atol=1e-5)
    assert {array.dtype for array in actions.values()} == {np.dtype(np.float32)}


def test_trajectory_of_another_robot_is_refused() -> None:
    trajectory = TrajectoryWriter(JOINTS).write(chunk(np.zeros((1, 2)), np.zeros((1, 1)), [0.0]))
    reader = TrajectoryReader(JOINTS, "/chunk")
    trajectory.joint_names = ["jaw", "pan", "knee"]
    with pytest.raises(ObservationError, match="/chunk: missing lift"):
        reader.read(trajectory)
    trajectory.joint_names = ["jaw", "pan", "lift"]
    trajectory.points[0].positions = []
    with pytest.raises(ObservationError, match="points without positions"):
        reader.read(trajectory)


def test_time_just_below_a_second_does_not_overflow_its_nanoseconds() -> None:
    trajectory = TrajectoryWriter(JOINTS).write(
        chunk(np.zeros((2, 2)), np.zeros((2, 1)), [0.9999999999, 59.99999999999])
    )
    assert [point.time_from_start.sec for point in trajectory.points] == [1, 60]
    assert [point.time_from_start.nanosec for point in trajectory.points] == [0, 0]


def test_target_that_is_not_finite_is_never_a_message() -> None:
    with pytest.raises(EngineError, match="lift"):
        TrajectoryWriter(JOINTS).write(
            chunk(np.array([[0.0, 0.0], [0.0, np.nan]]), np.zeros((2, 1)), [0.0, 0.1])
        )


def test_one_joint_under_two_action_keys_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="more than once: jaw"):
        TrajectoryWriter({"arm": ARM, "gripper": GRIPPER, "spare": GRIPPER})
