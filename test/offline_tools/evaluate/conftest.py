"""A generated policy of the recorded robot, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def g1_policy(
    write_minimal_checkpoint: Callable[[Path, Path], None],
    g1_dataset_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with `checkpoint` and `float` of the Unitree G1. Tests only read it."""
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    folder = tmp_path_factory.mktemp("g1_policy")
    write_minimal_checkpoint(folder / "checkpoint", g1_dataset_dir)
    write_bundle(
        ExportOptions(
            checkpoint=folder / "checkpoint",
            bundle=folder / "float",
            dataset=g1_dataset_dir,
            graphs="reference",
            precision="fp32",
            denoising_steps=2,
        ),
        report=lambda _: None,
    )
    return folder
