"""Skips, with the reason, where the simulator or PyTorch is missing."""

from __future__ import annotations

import pytest

import offline_tools.simulation  # noqa: F401  (how MuJoCo draws is set before it is imported)

for _library in ("mujoco", "torch", "transformers"):
    pytest.importorskip(_library, reason=f"the shipped policy in the simulation needs {_library}")
