"""One simulated robot for all tests of this folder; each test resets it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import offline_tools.simulation  # noqa: F401  (how MuJoCo draws is set before it is imported)

pytest.importorskip("mujoco", reason="the simulated robot needs MuJoCo")

if TYPE_CHECKING:
    from offline_tools.simulation.environment import Tabletop


@pytest.fixture(scope="session")
def simulation() -> Iterator[Tabletop]:
    from offline_tools.simulation.environment import Tabletop

    robot = Tabletop()
    yield robot
    robot.close()
