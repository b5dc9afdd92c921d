"""The shipped policy and a few demonstrations, each made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import offline_tools.simulation  # noqa: F401  (how MuJoCo draws is set before it is imported)

for _library in ("mujoco", "torch", "transformers"):
    pytest.importorskip(_library, reason=f"training needs {_library}")

if TYPE_CHECKING:
    from offline_tools.training.samples import Samples


@pytest.fixture(scope="session")
def samples() -> Samples:
    """One demonstration as samples. Tests only read it."""
    from offline_tools.simulation.demonstrations import demonstrate
    from offline_tools.simulation.environment import Tabletop
    from offline_tools.training.samples import episode_samples, network_images

    simulation = Tabletop()
    images: list[object] = []
    episode = demonstrate(
        simulation, 5, on_frames=lambda frames: images.append(network_images(frames))
    )
    simulation.close()
    return episode_samples(episode, images)  # type: ignore[arg-type]
