"""The processor's normalisation for many samples at once, on the device that trains.

Owns: encoding states, encoding chunks and decoding chunks as tensors. The robot's own functions
(`normalize_state`, `decode_actions`) take one observation at a time; a test holds these to them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.types import Float64Array


class Normalization:
    """State and action statistics of one embodiment as tensors."""

    def __init__(self, processor: Processor, device: torch.device) -> None:
        """Take the bounds over.

        Args:
            processor: All its keys must be encoded by minimum and maximum.
            device: Where the tensors are.
        """
        steps = processor.action_steps

        def joined(bounds: list[Float64Array | None], shape: tuple[int, ...]) -> Tensor:
            parts = []
            for bound in bounds:
                assert bound is not None, "only min/max encoding is trained with"
                parts.append(np.broadcast_to(bound, (*shape, bound.shape[-1])))
            return torch.from_numpy(np.concatenate(parts, axis=-1).astype(np.float32)).to(device)

        self._state_low = joined([key.low for key in processor.state_keys], ())
        self._state_high = joined([key.high for key in processor.state_keys], ())
        self._low = joined([key.low for key in processor.action_keys], (steps,))
        self._high = joined([key.high for key in processor.action_keys], (steps,))
        relative = [
            np.full(key.dim, key.representation == "relative") for key in processor.action_keys
        ]
        self._relative = torch.from_numpy(np.concatenate(relative).astype(np.float32)).to(device)
        self._state_pad = processor.max_state_dim - self._state_low.shape[-1]
        self._action_pad = processor.max_action_dim - self._low.shape[-1]

    def state(self, state: Tensor) -> Tensor:
        """Encode raw states, float32 (B, D), as (B, max_state_dim)."""
        unit = (state - self._state_low) / (self._state_high - self._state_low)
        encoded = (2.0 * unit - 1.0).clamp(-1.0, 1.0)
        return torch.nn.functional.pad(encoded, (0, self._state_pad))

    def chunk(self, chunk: Tensor, state: Tensor) -> Tensor:
        """Encode targets, float32 (B, H, D), given raw states, as (B, H, max_action_dim).

        Targets beyond the statistics are clipped, since no network output decodes to them.
        """
        offset = chunk - state[:, None] * self._relative
        unit = (offset - self._low) / (self._high - self._low)
        encoded = (2.0 * unit - 1.0).clamp(-1.0, 1.0)
        return torch.nn.functional.pad(encoded, (0, self._action_pad))

    def decode(self, actions: Tensor, state: Tensor) -> Tensor:
        """Decode network outputs (B, H, max_action_dim) to targets, float32 (B, H, D)."""
        width = self._low.shape[-1]
        unit = (actions[..., :width].float().clamp(-1.0, 1.0) + 1.0) / 2.0
        return unit * (self._high - self._low) + self._low + state[:, None] * self._relative
