"""What is compared with what: one factor at a time, on the scenes of the same seeds.

Owns: `Cell`, `Section` and the plan. Must not import an engine or the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.control.seams import SEAM_KINDS, SeamKind

TORCH = "pytorch"
REFERENCE = "reference"
DEPLOYED = "deployed"
# Name of an INT8 engine to the scheme of `groot-int8 quantize`. The third has the scales that
# TensorRT's entropy calibrator would choose, one a tensor, on every layer.
INT8_SCHEMES = {
    "int8-static": "static-max",
    "int8-calibrator": "static-entropy",
    "int8-row": "row",
    "int8-auto": "auto",
}
ENGINES = (TORCH, REFERENCE, DEPLOYED, *INT8_SCHEMES)

PLAIN = "plain"
OUTLIERS = "outliers"
MODELS = {
    PLAIN: "the trained policy",
    OUTLIERS: "the trained policy with a massive activation on live tokens and channel outliers",
}

OWN_STEPS = 4
STEPS = (1, 2)
LATENCIES_S = (0.0, 0.1, 0.2, 0.3, 0.5)
DEFAULT_SEAM: SeamKind = "linear_blend"


@dataclass(frozen=True)
class Cell:
    """One setup of the loop.

    Attributes:
        model: One of `MODELS`.
        engine: One of `ENGINES`.
        denoising_steps: Of the flow.
        latency_s: Of an inference.
        seam: How the executor goes from chunk to chunk.
    """

    model: str = PLAIN
    engine: str = DEPLOYED
    denoising_steps: int = OWN_STEPS
    latency_s: float = 0.0
    seam: SeamKind = DEFAULT_SEAM

    @property
    def name(self) -> str:
        """The cell in files and tables: model, engine, and what differs from the usual."""
        parts = [self.model, self.engine]
        if self.denoising_steps != OWN_STEPS:
            parts.append(f"steps-{self.denoising_steps}")
        if self.latency_s or self.seam != DEFAULT_SEAM:
            parts.append(f"latency-{round(1000 * self.latency_s)}")
            parts.append(self.seam)
        return ".".join(parts)

    @property
    def judged(self) -> bool:
        """Whether its answers can differ from those of the float graphs to the same question."""
        return self.engine != DEPLOYED or self.denoising_steps != OWN_STEPS


@dataclass(frozen=True)
class Section:
    """A table: cells, and what each is compared with.

    Attributes:
        title: Of the table.
        pairs: Cell and its baseline; a cell that is its own baseline is shown without a test.
        episodes: Scenes of each cell, from the first seed on.
    """

    title: str
    pairs: tuple[tuple[Cell, Cell], ...]
    episodes: int


def sections(engine_episodes: int, factor_episodes: int) -> tuple[Section, ...]:
    """Return the plan.

    Args:
        engine_episodes: Scenes for each engine.
        factor_episodes: Scenes for each number of steps, latency and seam.
    """
    engines = [
        Section(
            f"Engines, {meaning}",
            tuple((Cell(model, engine), Cell(model)) for engine in ENGINES),
            engine_episodes,
        )
        for model, meaning in MODELS.items()
    ]
    float_cell = Cell()
    steps = tuple((Cell(denoising_steps=count), float_cell) for count in (OWN_STEPS, *STEPS))
    seams = tuple((Cell(seam=seam), float_cell) for seam in SEAM_KINDS)
    latencies = [
        Section(
            f"Added latency, {seam}",
            tuple((Cell(latency_s=s, seam=seam), Cell(seam=seam)) for s in LATENCIES_S),
            factor_episodes,
        )
        for seam in SEAM_KINDS
    ]
    return (
        *engines,
        Section("Denoising steps", steps, factor_episodes),
        Section("Seams without latency", seams, factor_episodes),
        *latencies,
    )


def episodes_of(plan: tuple[Section, ...]) -> dict[Cell, int]:
    """Return every cell once, with the most episodes that a section asks of it."""
    wanted: dict[Cell, int] = {}
    for section in plan:
        for cell, baseline in section.pairs:
            for one in (cell, baseline):
                wanted[one] = max(wanted.get(one, 0), section.episodes)
    return wanted
