"""The simulated robot and the shipped policy in PyTorch, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import offline_tools.simulation  # noqa: F401  (how MuJoCo draws is set before it is imported)

for _library in ("mujoco", "torch", "transformers"):
    pytest.importorskip(_library, reason=f"the shipped policy in the simulation needs {_library}")

if TYPE_CHECKING:
    from offline_tools.closed_loop.torch_policy import TorchPolicy
    from offline_tools.simulation.environment import Tabletop


@pytest.fixture(scope="session")
def simulation() -> Iterator[Tabletop]:
    from offline_tools.simulation.environment import Tabletop

    robot = Tabletop()
    yield robot
    robot.close()


@pytest.fixture(scope="session")
def policy() -> TorchPolicy:
    from offline_tools.closed_loop.torch_policy import TorchPolicy
    from offline_tools.simulation.robot import robot_description
    from offline_tools.training.shipped import POLICY_FOLDER

    return TorchPolicy(POLICY_FOLDER, robot_description())
