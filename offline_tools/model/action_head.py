"""The flow-matching action head of GR00T N1.6: encoders, DiT, decoder, Euler loop.

Owns: the category-specific layers, the action head with the weights of all embodiments, and the
three small modules around its DiT, which an export deploys with one embodiment's weights. Must not
import the rest of the package but the model. Module names are chosen so that a state-dict key
equals the released checkpoint's key; the export modules keep the same names without the prefix
`action_head.` and with the embodiment's row of each weight.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offline_tools.model.configuration import ModelConfig
from offline_tools.model.dit import AlternateVLDiT

_LONGEST_PERIOD = 10000.0


class CategoryLinear(nn.Module):
    """A linear layer with one weight for each embodiment, or with one embodiment's alone.

    Attributes:
        W: Weights stored input by output, shape (embodiments, in, out), or (in, out) alone.
        b: Biases, shape (embodiments, out), or (out,) alone.
    """

    def __init__(self, embodiments: int | None, in_features: int, out_features: int) -> None:
        super().__init__()
        rows = () if embodiments is None else (embodiments,)
        self.embodiments = embodiments
        self.W = nn.Parameter(torch.zeros(*rows, in_features, out_features))
        self.b = nn.Parameter(torch.zeros(*rows, out_features))

    def forward(self, x: Tensor, embodiment_id: Tensor | None = None) -> Tensor:
        """Map x of shape (B, T, in) with the rows `embodiment_id`, int64, shape (B,)."""
        if self.embodiments is None:
            return torch.matmul(x, self.W) + self.b
        return torch.bmm(x, self.W[embodiment_id]) + self.b[embodiment_id].unsqueeze(1)


class CategoryMLP(nn.Module):
    """Two category-specific layers with a ReLU between them."""

    def __init__(
        self, embodiments: int | None, in_features: int, inner: int, out_features: int
    ) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(embodiments, in_features, inner)
        self.layer2 = CategoryLinear(embodiments, inner, out_features)

    def forward(self, x: Tensor, embodiment_id: Tensor | None = None) -> Tensor:
        """Map x of shape (B, T, in) to (B, T, out)."""
        result: Tensor = self.layer2(F.relu(self.layer1(x, embodiment_id)), embodiment_id)
        return result


def time_code(timestep: Tensor, width: int) -> Tensor:
    """Return the action encoder's code of integer time buckets.

    It has sines first, then cosines, of frequencies 10000 ** (-i / half), and is computed in
    float32 because buckets reach 1000.

    Args:
        timestep: Time buckets, int64, shape (B,).
        width: Width of the code.

    Returns:
        The code, float32, shape (B, width).
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(index * (-math.log(_LONGEST_PERIOD) / half))
    angle = timestep.to(torch.float32).unsqueeze(1) * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


class CategoryActionEncoder(nn.Module):
    """Embedding of noisy actions together with the integer time bucket."""

    def __init__(self, embodiments: int | None, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.W1 = CategoryLinear(embodiments, action_dim, width)
        self.W2 = CategoryLinear(embodiments, 2 * width, width)
        self.W3 = CategoryLinear(embodiments, width, width)

    def forward(
        self, actions: Tensor, timestep: Tensor, embodiment_id: Tensor | None = None
    ) -> Tensor:
        """Embed actions.

        Args:
            actions: Noisy actions, shape (B, H, max_action_dim).
            timestep: Time buckets, int64, shape (B,).
            embodiment_id: Rows of the weights, int64, shape (B,); None with one embodiment.

        Returns:
            Features without position, shape (B, H, width).
        """
        code = time_code(timestep, self.width)
        embedded = self.W1(actions, embodiment_id)
        code = code.to(embedded.dtype).unsqueeze(1).expand(-1, embedded.shape[1], -1)
        joined = torch.cat([embedded, code], dim=2)
        result: Tensor = self.W3(F.silu(self.W2(joined, embodiment_id)), embodiment_id)
        return result


def _action_tokens(
    state_features: Tensor, action_features: Tensor, position_embedding: nn.Embedding | None
) -> Tensor:
    """Add positions to the action tokens and put the state token, which has none, first."""
    if position_embedding is not None:
        action_features = action_features + position_embedding.weight[: action_features.shape[1]]
    return torch.cat([state_features, action_features], dim=1)


def time_bucket(step: int, steps: int, buckets: int) -> int:
    """Return the integer time of an Euler step: floor(step / steps * buckets)."""
    return int(step / steps * buckets)


class ActionHead(nn.Module):
    """The action head with the weights of all embodiments."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        count, width = config.max_embodiments, config.dit.width
        self.state_encoder = CategoryMLP(count, config.max_state_dim, config.mlp_size, width)
        self.action_encoder = CategoryActionEncoder(count, config.max_action_dim, width)
        self.action_decoder = CategoryMLP(
            count, config.dit.output_dim, config.mlp_size, config.max_action_dim
        )
        self.model = AlternateVLDiT(config.dit)
        self.vlln: nn.Module = (
            nn.LayerNorm(config.dit.cross_dim) if config.use_vlln else nn.Identity()
        )
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, width) if config.add_position_embedding else None
        )

    def condition(
        self, hidden_states: Tensor, state: Tensor, embodiment_id: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepare what stays the same over the denoising steps.

        Args:
            hidden_states: Backbone features, shape (B, S, cross width).
            state: Normalised and padded state, shape (B, max_state_dim).
            embodiment_id: Rows of the weights, int64, shape (B,).

        Returns:
            Keys and values of the cross-attention, shape (B, S, cross width), and the state
            token, shape (B, 1, width).
        """
        return self.vlln(hidden_states), self.state_encoder(state.unsqueeze(1), embodiment_id)

    def encode_action(
        self, state_features: Tensor, actions: Tensor, timestep: Tensor, embodiment_id: Tensor
    ) -> Tensor:
        """Return the DiT's input: the state token, then the embedded noisy actions.

        Args:
            state_features: State token, shape (B, 1, width).
            actions: Noisy actions, shape (B, H, max_action_dim).
            timestep: Time buckets, int64, shape (B,).
            embodiment_id: Rows of the weights, int64, shape (B,).

        Returns:
            Tokens, shape (B, 1 + H, width).
        """
        features = self.action_encoder(actions, timestep, embodiment_id)
        return _action_tokens(state_features, features, self.position_embedding)

    def join_tokens(self, state_features: Tensor, action_features: Tensor) -> Tensor:
        """Put encoded actions behind the state token, shapes as in `encode_action`."""
        return _action_tokens(state_features, action_features, self.position_embedding)

    def decode_velocity(self, dit_output: Tensor, embodiment_id: Tensor) -> Tensor:
        """Return the velocity of the action tokens.

        Args:
            dit_output: Output of the DiT, shape (B, 1 + H, output width).
            embodiment_id: Rows of the weights, int64, shape (B,).

        Returns:
            Velocity, shape (B, H, max_action_dim).
        """
        result: Tensor = self.action_decoder(dit_output[:, 1:], embodiment_id)
        return result

    def velocity(
        self,
        vl_embs: Tensor,
        state_features: Tensor,
        actions: Tensor,
        timestep: Tensor,
        image_mask: Tensor,
        backbone_attention_mask: Tensor,
        embodiment_id: Tensor,
    ) -> Tensor:
        """Predict the flow's velocity at one time, shapes as in the other methods."""
        tokens = self.encode_action(state_features, actions, timestep, embodiment_id)
        output = self.model(tokens, vl_embs, timestep, image_mask, backbone_attention_mask)
        return self.decode_velocity(output, embodiment_id)

    def denoise(
        self,
        vl_embs: Tensor,
        state_features: Tensor,
        noise: Tensor,
        image_mask: Tensor,
        backbone_attention_mask: Tensor,
        embodiment_id: Tensor,
        steps: int,
    ) -> Tensor:
        """Integrate the flow from noise to actions with Euler steps of equal size.

        Args:
            vl_embs: Layer-normed backbone features, shape (B, S, cross width).
            state_features: State token, shape (B, 1, width).
            noise: Standard normal start, shape (B, H, max_action_dim).
            image_mask: Which backbone tokens are image tokens, bool, shape (B, S).
            backbone_attention_mask: Which backbone tokens are real, bool, shape (B, S).
            embodiment_id: Rows of the weights, int64, shape (B,).
            steps: Number of Euler steps.

        Returns:
            Normalised actions, not clipped, shape (B, H, max_action_dim).
        """
        actions = noise
        for step in range(steps):
            bucket = time_bucket(step, steps, self.config.timestep_buckets)
            timestep = torch.full(
                (noise.shape[0],), bucket, dtype=torch.int64, device=noise.device
            )
            velocity = self.velocity(
                vl_embs,
                state_features,
                actions,
                timestep,
                image_mask,
                backbone_attention_mask,
                embodiment_id,
            )
            actions = actions + (1.0 / steps) * velocity
        return actions


class Conditioner(nn.Module):
    """Backbone features and state to what the denoising steps share.

    Args:
        config: Sizes of the model.
        embodiments: How many the weights are for; None: for one, whose number is not asked then.
    """

    def __init__(self, config: ModelConfig, embodiments: int | None = None) -> None:
        super().__init__()
        self.vlln: nn.Module = (
            nn.LayerNorm(config.dit.cross_dim) if config.use_vlln else nn.Identity()
        )
        self.state_encoder = CategoryMLP(
            embodiments, config.max_state_dim, config.mlp_size, config.dit.width
        )

    def forward(
        self, hidden_states: Tensor, state: Tensor, embodiment_id: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map (B, S, cross width) and (B, max_state_dim); see `ActionHead.condition`."""
        return self.vlln(hidden_states), self.state_encoder(state.unsqueeze(1), embodiment_id)


class ActionEncoder(nn.Module):
    """Noisy actions to the DiT's tokens; arguments as those of `Conditioner`."""

    def __init__(self, config: ModelConfig, embodiments: int | None = None) -> None:
        super().__init__()
        width = config.dit.width
        self.action_encoder = CategoryActionEncoder(embodiments, config.max_action_dim, width)
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, width) if config.add_position_embedding else None
        )

    def forward(
        self,
        state_features: Tensor,
        actions: Tensor,
        timestep: Tensor,
        embodiment_id: Tensor | None = None,
    ) -> Tensor:
        """Return tokens of shape (B, 1 + H, width); see `ActionHead.encode_action`."""
        features = self.action_encoder(actions, timestep, embodiment_id)
        return _action_tokens(state_features, features, self.position_embedding)


class ActionDecoder(nn.Module):
    """The DiT's output to the velocity of the actions; arguments as those of `Conditioner`."""

    def __init__(self, config: ModelConfig, embodiments: int | None = None) -> None:
        super().__init__()
        self.action_decoder = CategoryMLP(
            embodiments, config.dit.output_dim, config.mlp_size, config.max_action_dim
        )

    def forward(self, dit_output: Tensor, embodiment_id: Tensor | None = None) -> Tensor:
        """Map (B, 1 + H, output width) to (B, H, max_action_dim)."""
        result: Tensor = self.action_decoder(dit_output[:, 1:], embodiment_id)
        return result


def embodiment_row(key: str, tensor: Tensor, embodiment_id: int) -> Tensor:
    """Return the part of a checkpoint's tensor that one embodiment uses.

    Args:
        key: Key without the prefix `action_head.`, which is the parameter's name in
            `Conditioner`, `ActionEncoder` or `ActionDecoder`.
        tensor: The checkpoint's tensor.
        embodiment_id: Row of the category-specific weights.

    Returns:
        The row of a category-specific weight or bias, any other tensor as it is.
    """
    part = key.split(".", 1)[0]
    specific = part in {"state_encoder", "action_encoder", "action_decoder"}
    return tensor[embodiment_id] if specific else tensor
