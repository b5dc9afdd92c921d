"""How two tensors are compared, and when they agree.

Owns: the metrics and thresholds. Must not import torch. They are those of the community's own
check of its N1.6 export (Isaac-GR00T, scripts/deployment): cosine similarity, the 99th percentile
of the absolute error instead of its maximum, no NaN, and masks that are equal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_COSINE = 0.999
DEFAULT_ATOL = 0.5


@dataclass(frozen=True)
class Comparison:
    """One tensor of one graph, from two engines.

    Attributes:
        name: What was compared.
        cosine: Cosine similarity of the flattened tensors.
        relative_l2: Norm of the difference over the norm of the reference.
        p99_absolute: 99th percentile of the absolute difference.
        max_absolute: Largest absolute difference.
        passed: Whether the thresholds hold.
    """

    name: str
    cosine: float
    relative_l2: float
    p99_absolute: float
    max_absolute: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; figures that are not finite become None."""
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def compare(
    name: str, reference: NDArray[Any], found: NDArray[Any], atol: float = DEFAULT_ATOL
) -> Comparison:
    """Compare two floating tensors.

    Args:
        name: What is compared.
        reference: The tensor that is taken as right.
        found: The tensor under test, of the same shape.
        atol: Largest 99th percentile of the absolute error.
    """
    if reference.shape != found.shape:
        raise ValueError(f"{name}: shapes {reference.shape} and {found.shape} differ")
    a, b = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    if not a.size:
        raise ValueError(f"{name}: nothing to compare")
    # What is not finite gives NaN figures, and a NaN passes no threshold.
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b)
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        # Two zero tensors agree; a zero tensor and another one have nothing in common.
        cosine = float(a @ b / norms) if norms else float(not error.any())
        scale = float(np.linalg.norm(a))
        relative_l2 = float(np.linalg.norm(error) / scale) if scale else float(error.any())
        p99 = float(np.percentile(error, 99))
    return Comparison(
        name=name,
        cosine=cosine,
        relative_l2=relative_l2,
        p99_absolute=p99,
        max_absolute=float(error.max()),
        passed=bool(cosine >= MIN_COSINE and p99 < atol and np.isfinite(b).all()),
    )


def compare_masks(name: str, reference: NDArray[Any], found: NDArray[Any]) -> Comparison:
    """Compare two masks, which must be equal."""
    if reference.shape != found.shape:
        raise ValueError(f"{name}: shapes {reference.shape} and {found.shape} differ")
    differing = float(np.mean(reference != found))
    return Comparison(
        name=name,
        cosine=1.0 - differing,
        relative_l2=differing,
        p99_absolute=differing,
        max_absolute=float(differing > 0.0),
        passed=differing == 0.0,
    )


def worst(comparisons: list[Comparison]) -> Comparison:
    """Fold the comparisons of one tensor over several observations into the worst figures."""
    return Comparison(
        name=comparisons[0].name,
        cosine=float(np.min([c.cosine for c in comparisons])),
        relative_l2=float(np.max([c.relative_l2 for c in comparisons])),
        p99_absolute=float(np.max([c.p99_absolute for c in comparisons])),
        max_absolute=float(np.max([c.max_absolute for c in comparisons])),
        passed=all(c.passed for c in comparisons),
    )
