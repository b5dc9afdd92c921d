"""The shapes that an engine is built for.

Owns: lengths of the varying axes and the optimisation profiles made from them. Must not import
torch or TensorRT. Axes are named in the bundle's manifest: `batch` is always 1, `images` is the
number of cameras, `sequence` is the prompt's length and the one axis that moves at run time, with
the instruction. Deployed graphs have fixed shapes: there is nothing to choose, and no profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.families import DEPLOYED
from groot_int8_ros.policy.image_sizes import image_sizes

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

# Prefix, delimiters and suffix of the prompt with an instruction of usual length, in tokens beside
# those of the images; and with a long one.
_USUAL_TEXT_TOKENS = 48
_LONG_TEXT_TOKENS = 128


@dataclass(frozen=True)
class Lengths:
    """Smallest, best and largest length of each named axis."""

    axes: Mapping[str, tuple[int, int, int]]

    def profile(self, name: str, spec: TensorSpec) -> Profile:
        """Return a tensor's smallest, best and largest shape.

        Raises:
            ConfigurationError: It varies along an axis whose length is not known.
        """
        unknown = [a for a in spec.shape if isinstance(a, str) and a not in self.axes]
        if unknown:
            raise ConfigurationError(
                f"the tensor {name} varies along {unknown[0]!r}, whose length is not known; known "
                f"are {', '.join(self.axes)}. Export the bundle again."
            )
        smallest, best, largest = (
            tuple(axis if isinstance(axis, int) else self.axes[axis][which] for axis in spec.shape)
            for which in range(3)
        )
        return smallest, best, largest

    def profiles(self, specs: Mapping[str, TensorSpec]) -> dict[str, Profile]:
        """Return the profile of each tensor that varies."""
        return {name: self.profile(name, spec) for name, spec in specs.items() if spec.varies}


def lengths_of(
    bundle: Bundle,
    *,
    max_seq_len: int | None = None,
    opt_seq_len: int | None = None,
    opt_sa_seq: int | None = None,
    exact: bool = False,
) -> Lengths:
    """Choose the lengths for a bundle.

    Args:
        bundle: Gives cameras and the trained horizon.
        max_seq_len: Longest prompt in tokens, images included; room for a long instruction beside
            the images if None.
        opt_seq_len: Length that kernels are chosen for; if None, `max_seq_len` where it is given,
            else the length with a usual instruction.
        opt_sa_seq: Tokens of state and actions in the DiT; 1 + the trained horizon if None. The
            bundle's graphs fix it, so another value is refused.
        exact: Build for `max_seq_len` alone.

    Returns:
        The lengths; of deployed graphs none, for no axis of theirs varies.

    Raises:
        ConfigurationError: The lengths contradict each other or the bundle.
    """
    if bundle.manifest.family == DEPLOYED:
        if exact or any(given is not None for given in (max_seq_len, opt_seq_len, opt_sa_seq)):
            raise ConfigurationError(
                f"{bundle.folder} has deployed graphs, whose shapes are fixed: leave out "
                "--max-seq-len, --opt-seq-len, --opt-sa-seq and --exact. Room for longer "
                "instructions is made by the export (--max-prefix-tokens)."
            )
        return Lengths({})
    tokens_of_actions = 1 + bundle.manifest.action_horizon
    if opt_sa_seq not in (None, tokens_of_actions):
        raise ConfigurationError(
            f"--opt-sa-seq {opt_sa_seq}: the bundle's graphs run {tokens_of_actions} tokens "
            f"(1 state + {bundle.manifest.action_horizon} actions). Leave the option out, or "
            "export a checkpoint with another horizon."
        )
    images = _image_tokens(bundle)
    usual, longest = images + _USUAL_TEXT_TOKENS, images + _LONG_TEXT_TOKENS
    if max_seq_len is None:
        if exact:
            raise ConfigurationError("--exact needs --max-seq-len: the prompt's length in tokens")
    elif max_seq_len <= images:
        raise ConfigurationError(
            f"--max-seq-len {max_seq_len} has no room for a prompt: its images alone are {images} "
            f"tokens, and its text comes on top. Give {usual} for an instruction of usual length, "
            f"{longest} for a long one, or with --exact the prompt's own length"
        )
    else:
        usual = longest = max_seq_len
    best = usual if exact or opt_seq_len is None else opt_seq_len
    if not 1 <= best <= longest:
        raise ConfigurationError(f"--opt-seq-len {best} must be from 1 to --max-seq-len {longest}")
    cameras = len(bundle.manifest.robot.cameras)
    return Lengths(
        {
            "batch": (1, 1, 1),
            "images": (cameras, cameras, cameras),
            "sequence": (longest if exact else 1, best, longest),
        }
    )


def _image_tokens(bundle: Bundle) -> int:
    chain = bundle.processor.image_chain
    return sum(
        image_sizes(camera.height, camera.width, chain).tokens
        for camera in bundle.manifest.robot.cameras
    )
