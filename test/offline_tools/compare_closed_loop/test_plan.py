"""Hazards of the plan: two factors changed at once, too few episodes, two cells in one file."""

from __future__ import annotations

from dataclasses import asdict

from groot_int8_ros.control.seams import SEAM_KINDS
from offline_tools.compare_closed_loop.plan import (
    ENGINES,
    LATENCIES_S,
    MODELS,
    episodes_of,
    sections,
)


def test_a_cell_differs_from_its_baseline_in_one_factor() -> None:
    for section in sections(100, 50):
        for cell, baseline in section.pairs:
            before = asdict(baseline)
            changed = [name for name, value in asdict(cell).items() if value != before[name]]
            assert len(changed) <= 1, (section.title, cell.name, changed)
        assert any(cell == baseline for cell, baseline in section.pairs), section.title


def test_every_engine_step_latency_and_seam_is_run_often_enough() -> None:
    wanted = episodes_of(sections(100, 50))
    for model in MODELS:
        for engine in ENGINES:
            counts = [n for c, n in wanted.items() if (c.model, c.engine) == (model, engine)]
            assert max(counts) == 100
    for seam in SEAM_KINDS:
        for latency in LATENCIES_S:
            counts = [n for c, n in wanted.items() if (c.seam, c.latency_s) == (seam, latency)]
            assert max(counts) >= 50
    assert {cell.denoising_steps for cell in wanted} == {1, 2, 4}


def test_no_two_cells_share_a_file() -> None:
    cells = episodes_of(sections(100, 50))
    assert len({cell.name for cell in cells}) == len(cells)
    assert not any(set(cell.name) & set("/ ") for cell in cells)
