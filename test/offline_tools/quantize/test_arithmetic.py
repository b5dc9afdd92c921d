"""Migration and rotation change no product, and mend what each is there for."""

from __future__ import annotations

import numpy as np
import pytest

from groot_int8_ros.policy.types import Float32Array
from offline_tools.quantize import arithmetic


def _rows(seed: int = 0, channels: int = 128) -> Float32Array:
    rows: Float32Array = np.random.RandomState(seed).standard_normal((64, channels)).astype("f4")
    return rows


def _weight() -> Float32Array:
    return _rows(1, 128).T.copy() * np.float32(0.02)


def _error(rows: Float32Array, weight: Float32Array, wanted: Float32Array) -> float:
    found = arithmetic.row_input(rows) @ arithmetic.dequantised_weight(weight)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _levels(rows: Float32Array) -> Float32Array:
    sizes = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    levels: Float32Array = np.mean(np.abs(rows) / sizes, axis=0)
    return levels


def test_migration_and_rotation_leave_the_product_as_it_was() -> None:
    rows, weight = _rows(), _weight()
    factors = arithmetic.migration_factors(np.abs(rows).max(0), np.abs(weight).max(1), 0.5)
    changed = arithmetic.transformed_weight(weight, factors, 32)
    moved = arithmetic.rotated(rows * (np.float32(1) / factors), 32)
    assert moved @ changed == pytest.approx(rows @ weight, abs=1e-4)


def test_migration_undoes_channel_outliers_that_preserve_the_function() -> None:
    rows, weight = _rows(), _weight()
    wanted = rows @ weight
    scale = np.ones(128, np.float32)
    scale[[3, 77]] = 1000.0
    rows, weight = rows * scale, weight / scale[:, None]
    factors = arithmetic.migration_factors(_levels(rows), np.abs(weight).max(1), 0.5)
    assert _error(rows, weight, wanted) > 0.3
    assert _error(rows / factors, weight * factors[:, None], wanted) < 0.015


def test_one_massive_token_does_not_set_the_factors_of_all_others() -> None:
    rows, weight = _rows(), _weight()
    rows[0, 5] = 1.9e4
    from_levels = arithmetic.migration_factors(_levels(rows), np.abs(weight).max(1), 0.5)
    wanted = rows[1:] @ weight
    migrated = _error(rows[1:] / from_levels, weight * from_levels[:, None], wanted)
    assert migrated < 1.2 * _error(rows[1:], weight, wanted)


def test_rotation_evens_out_heavy_tails() -> None:
    rows = np.random.RandomState(2).standard_t(2, (64, 128)).astype(np.float32)
    weight = _weight()
    wanted = rows @ weight
    turned = _error(arithmetic.rotated(rows, 64), arithmetic.rotated(weight.T, 64).T, wanted)
    assert turned < 0.6 * _error(rows, weight, wanted)


@pytest.mark.parametrize(
    ("channels", "block"), [(6144, 64), (1536, 64), (4304, 16), (96, 32), (588, None), (7, None)]
)
def test_rotation_blocks_divide_the_channels(channels: int, block: int | None) -> None:
    assert arithmetic.rotation_block(channels) == block


def test_dead_channels_get_finite_factors() -> None:
    channel_max = np.array([0.0, 0.0, 3.0], np.float32)
    weight_max = np.array([0.0, 2.0, 0.0], np.float32)
    for alpha in (0.0, 0.5, 1.0):
        factors = arithmetic.migration_factors(channel_max, weight_max, alpha)
        assert np.isfinite(factors).all()
        assert (factors > 0.0).all()
    zeros = np.zeros(3, np.float32)
    assert np.array_equal(arithmetic.migration_factors(zeros, zeros, 0.5), np.ones(3, np.float32))


def test_rows_and_weights_of_zeros_stay_zero() -> None:
    zeros = np.zeros((2, 4), np.float32)
    assert not arithmetic.row_input(zeros).any()
    assert not arithmetic.dequantised_weight(zeros).any()


def test_a_row_keeps_its_relative_precision_whatever_its_size() -> None:
    row = _rows()[:1]
    for size in (1e-9, 1.0, 1.9e4, 1e30):
        found = arithmetic.row_input(row * np.float32(size)) / np.float32(size)
        assert found == pytest.approx(row, abs=float(np.abs(row).max()) / 127)


# As in docs/quantization.md, in per cent: static-max, row, and row with migration, with rotation
# and with both.
_TABLE = {
    "normal": (1.5, 1.2, 1.2, 1.2, 1.2),
    "channels": (79.0, 43.0, 1.2, 8.6, 1.2),
    "token": (100.0, 1.2, 1.2, 1.2, 1.2),
    "tails": (22.0, 3.3, 3.1, 1.2, 1.2),
}


def _table_case(name: str) -> tuple[Float32Array, Float32Array]:
    random = np.random.default_rng(0)
    weight = (random.standard_normal((2048, 512)) * 0.02).astype(np.float32)
    rows = random.standard_normal((256, 2048)).astype(np.float32)
    if name == "channels":
        scale = np.ones(2048, np.float32)
        scale[random.choice(2048, 8, replace=False)] = 100.0
        rows, weight = rows * scale, weight / scale[:, None]
    elif name == "token":
        rows[0, 7] = 1.9e4
    elif name == "tails":
        rows = random.standard_t(3, rows.shape).astype(np.float32)
    return rows, weight


@pytest.mark.parametrize("name", sorted(_TABLE))
def test_the_table_of_the_documentation_is_what_comes_out(name: str) -> None:
    rows, weight = _table_case(name)
    wanted = rows @ weight
    sizes = np.linalg.norm(wanted, axis=1)

    def error(restored: Float32Array, changed: Float32Array) -> float:
        gap = restored @ arithmetic.dequantised_weight(changed) - wanted
        return 100.0 * float(np.sqrt(np.mean((np.linalg.norm(gap, axis=1) / sizes) ** 2)))

    found = [error(arithmetic.static_input(rows, float(np.abs(rows).max()) / 127), weight)]
    factors = arithmetic.migration_factors(_levels(rows), np.abs(weight).max(axis=1), 0.5)
    for rotation in (None, 64):
        for used in (None, factors):
            moved = rows if used is None else rows / used
            moved = moved if rotation is None else arithmetic.rotated(moved, rotation)
            changed = arithmetic.transformed_weight(weight, used, rotation)
            found.append(error(arithmetic.row_input(moved), changed))
    assert found == pytest.approx(list(_TABLE[name]), rel=0.12)
