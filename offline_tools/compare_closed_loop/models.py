"""The checkpoints and bundles that cells need, made once and kept.

Owns: where they lie in the comparison's folder, and the order in which they are made. Export,
calibration and quantisation are those of their own commands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.policy.files import atomic_directory
from groot_int8_ros.policy.policy import DEFAULT_SEED, Policy
from groot_int8_ros.policy.processor import load_processor
from offline_tools.calibration.dataset_source import DatasetSource
from offline_tools.calibration.run import capture
from offline_tools.compare_closed_loop.plan import (
    DEPLOYED,
    INT8_SCHEMES,
    OUTLIERS,
    OWN_STEPS,
    PLAIN,
    REFERENCE,
    TORCH,
    Cell,
)
from offline_tools.quantize.int8_bundle import AUTO, QuantizeOptions, quantize_bundle
from offline_tools.simulation.tasks import TASKS


@dataclass(frozen=True)
class Sources:
    """What everything is made from.

    Attributes:
        checkpoint: Of the trained policy.
        robot: Its robot's description.
        dataset: Recording of the robot that INT8 is calibrated on.
        calibration_samples: Observations of it.
    """

    checkpoint: Path
    robot: Path
    dataset: Path
    calibration_samples: int


class Models:
    """Makes what is missing.

    Args:
        folder: Where everything is kept.
        sources: What it is made from.
        report: Called with a line of progress at a time.
    """

    def __init__(self, folder: Path, sources: Sources, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._sources = sources
        self._report = report

    def of(self, cell: Cell) -> Path:
        """Return the checkpoint (PyTorch) or the bundle (the rest) that a cell runs."""
        if cell.engine == TORCH:
            return self._checkpoint(cell.model)
        if cell.engine in INT8_SCHEMES:
            return self._quantized(cell.model, INT8_SCHEMES[cell.engine])
        return self._exported(cell.model, cell.engine, cell.denoising_steps)

    def float_of(self, cell: Cell) -> Path:
        """Return the float deployed bundle that a cell's answers are compared with."""
        return self._exported(cell.model, DEPLOYED, OWN_STEPS)

    def _checkpoint(self, model: str) -> Path:
        if model == PLAIN:
            return self._sources.checkpoint
        assert model == OUTLIERS
        target = self._folder / model / "checkpoint"
        if not target.exists():
            self._report(f"{target}: adding outliers")
            _add_outliers(self._sources.checkpoint, target)
        return target

    def _exported(self, model: str, family: str, steps: int) -> Path:
        from offline_tools.export.bundle_writer import ExportOptions, write_bundle

        name = family if steps == OWN_STEPS else f"{family}-steps-{steps}"
        target = self._folder / model / name
        if not target.exists():
            self._report(f"{target}: exporting")
            write_bundle(
                ExportOptions(
                    checkpoint=self._checkpoint(model),
                    bundle=target,
                    robot=self._sources.robot,
                    graphs=family,
                    instructions=(
                        () if family == REFERENCE else tuple(task.instruction for task in TASKS)
                    ),
                    precision="fp32",
                    denoising_steps=steps,
                ),
                _silent,
            )
        return target

    def _quantized(self, model: str, scheme: str) -> Path:
        target = self._folder / model / scheme
        if not target.exists():
            calibration = self._calibration(model)
            self._report(f"{target}: quantising")
            quantize_bundle(
                QuantizeOptions(
                    bundle=self._exported(model, DEPLOYED, OWN_STEPS),
                    calibration=calibration,
                    output=target,
                    scheme=scheme,
                    # How bad a fixed scheme is has to show in the table.
                    accept=scheme != AUTO,
                    threads=1,
                ),
                _silent,
            )
        return target

    def _calibration(self, model: str) -> Path:
        target = self._folder / model / "captures"
        if not target.exists():
            bundle = self._exported(model, DEPLOYED, OWN_STEPS)
            self._report(f"{target}: capturing")
            policy = Policy.load(bundle, threads=1)
            try:
                with atomic_directory(target) as folder:
                    capture(
                        policy,
                        DatasetSource(self._sources.dataset, policy),
                        folder,
                        samples=self._sources.calibration_samples,
                        seed=DEFAULT_SEED,
                        report=_silent,
                    )
            finally:
                policy.close()
        return target


def _add_outliers(checkpoint: Path, target: Path) -> None:
    """Write the checkpoint with a massive activation first, which changes the function a little.

    The channel outliers on top of it change nothing.
    """
    from offline_tools.compare_quantization.outliers import write_edited
    from offline_tools.compare_quantization.variants import (
        CHANNELS,
        MASSIVE_LIVE,
        plan_variant,
        prompt_tokens,
    )
    from offline_tools.model.configuration import find_eagle_config, load_model_config

    config, _ = load_model_config(checkpoint, find_eagle_config(checkpoint, None))
    tokens = prompt_tokens(load_processor(checkpoint), checkpoint)
    with tempfile.TemporaryDirectory(prefix="groot-int8-") as work:
        massive = Path(work) / "massive"
        write_edited(checkpoint, massive, plan_variant(MASSIVE_LIVE, config, tokens, 0))
        write_edited(massive, target, plan_variant(CHANNELS, config, tokens, 0))


def _silent(_line: str) -> None:
    """Every step reports each graph; here that would drown the cells."""
