from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from offline_tools.export.graph import build_empty
from offline_tools.export.graphs import reference_graphs
from offline_tools.model.action_head import time_bucket
from offline_tools.model.checkpoint import load_model, load_weights
from offline_tools.model.configuration import DiTConfig
from offline_tools.model.dit import Block
from offline_tools.model.policy_model import GrootN16, ModelInputs

if TYPE_CHECKING:
    from test.offline_tools.model.conftest import TinyCheckpoint

IMAGE = 60


@pytest.fixture
def model(tiny: TinyCheckpoint) -> GrootN16:
    return load_model(tiny.directory)[0]


def inputs(images: int = 2) -> ModelInputs:
    generator = torch.Generator().manual_seed(3)
    # 56 x 84 pixels: 4 x 6 patches, 6 image tokens.
    ids = [5, 9, *([7, *[IMAGE] * 6, 8] * images), 3]
    return ModelInputs(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        pixel_values=torch.rand((images, 3, 56, 84), generator=generator) * 2 - 1,
        state=torch.randn((1, 7), generator=generator),
        embodiment_id=1,
    )


def run_backbone(model: GrootN16, given: ModelInputs) -> Tensor:
    with torch.no_grad():
        features: Tensor = model.backbone(
            given.input_ids, given.attention_mask, given.pixel_values
        )[0]
    return features


def test_a_constant_position_embedding_gives_the_same_features(model: GrootN16) -> None:
    given = inputs()
    position = model.backbone.vision.position_embedding(4, 6)
    with torch.no_grad():
        features = model.backbone(
            given.input_ids, given.attention_mask, given.pixel_values, position
        )[0]
    assert torch.equal(features, run_backbone(model, given))


def test_images_do_not_see_each_other_in_the_vision_tower(model: GrootN16) -> None:
    given = inputs()
    changed = given.pixel_values.clone()
    changed[1] = 0
    with torch.no_grad():
        before = model.backbone.vision(given.pixel_values)
        after = model.backbone.vision(changed)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_prompt_features_do_not_depend_on_the_images_behind_them(model: GrootN16) -> None:
    given = inputs()
    changed = ModelInputs(
        given.input_ids, given.attention_mask, -given.pixel_values, given.state, 1
    )
    before, after = run_backbone(model, given), run_backbone(model, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_padding_on_the_left_changes_no_row_of_a_batch_but_its_positions(
    model: GrootN16,
) -> None:
    # Equal lengths, one row padded: the padded tokens must not be seen by the others.
    given = inputs()
    ids = given.input_ids.repeat(2, 1)
    mask = given.attention_mask.repeat(2, 1)
    mask[1, 0] = 0
    pixels = given.pixel_values.repeat(2, 1, 1, 1)
    other = ids.clone()
    other[1, 0] = 11
    with torch.no_grad():
        first = model.backbone(ids, mask, pixels)[0]
        second = model.backbone(other, mask, pixels)[0]
    assert torch.equal(first[1, 1:], second[1, 1:])
    assert torch.allclose(first[0], run_backbone(model, given)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padded_rows_stay_finite_in_half_precision(
    tiny: TinyCheckpoint, dtype: torch.dtype
) -> None:
    # A mask of the type's lowest value overflows on negative scores: NaN in padded rows, then
    # everywhere. Large queries and keys make the scores large.
    name = "backbone.model.language_model.model.layers.0.self_attn"
    for norm in ("q_norm", "k_norm"):
        tiny.weights[f"{name}.{norm}.weight"][:] = 8.0
    tiny.write_weights()
    model, _, _ = load_model(tiny.directory, dtype=dtype)
    given = inputs()
    mask = given.attention_mask.clone()
    mask[:, :2] = 0
    with torch.no_grad():
        features, valid, image = model.backbone(
            given.input_ids, mask, given.pixel_values.to(dtype)
        )
        rows = torch.tensor([1])
        vl_embs, state = model.action_head.condition(features, given.state.to(dtype), rows)
        velocity = model.action_head.velocity(
            vl_embs,
            state,
            torch.ones(1, 5, 6, dtype=dtype),
            torch.tensor([750]),
            image,
            valid,
            rows,
        )
    assert velocity.dtype == dtype
    assert torch.isfinite(features).all()
    assert torch.isfinite(velocity).all()


def test_text_and_image_blocks_read_disjoint_tokens(model: GrootN16) -> None:
    dit = model.action_head.model
    generator = torch.Generator().manual_seed(5)
    image = torch.tensor([[False, True, True, False, False]])
    valid = torch.tensor([[False, True, True, True, True]])
    vl_embs = torch.randn((1, 5, 16), generator=generator)
    tokens = torch.randn((1, 6, 24), generator=generator)
    with torch.no_grad():
        time = dit.timestep_encoder(torch.tensor([250]))
        biases = dit.attention_biases(image, valid, torch.float32)
        for block, read in ((0, (3, 4)), (2, (1, 2))):
            before = dit.run_block(block, tokens, time, vl_embs, biases)
            for position in range(5):
                changed = vl_embs.clone()
                changed[:, position] += 1
                after = dit.run_block(block, tokens, time, changed, biases)
                assert torch.equal(before, after) == (position not in read)


def around_dit(tiny: TinyCheckpoint, model: GrootN16, embodiment: int) -> tuple[nn.Module, ...]:
    """Return the three modules around the DiT with the weights that an export gives them."""
    graphs = reference_graphs(
        model.action_head.config,
        tiny.weights.__getitem__,
        embodiment_id=embodiment,
        image_shape=(56, 84),
        precision="fp32",
    )
    modules = []
    for name in ("conditioner", "action_encoder", "action_decoder"):
        module, weights = build_empty(graphs[name].spec), graphs[name].weights
        keys = [key for key, _ in module.named_parameters()]
        load_weights(module, ((key, weights(key)) for key in keys), torch.float32)
        modules.append(module)
    return tuple(modules)


@pytest.mark.parametrize("embodiment", [0, 2])
def test_one_embodiments_modules_equal_its_rows_of_the_full_head(
    tiny: TinyCheckpoint, model: GrootN16, embodiment: int
) -> None:
    head = model.action_head
    conditioner, encoder, decoder = around_dit(tiny, model, embodiment)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((2, 4, 16), generator=generator)
    state = torch.randn((2, 7), generator=generator)
    actions = torch.randn((2, 5, 6), generator=generator)
    output = torch.randn((2, 6, 8), generator=generator)
    timestep, rows = torch.tensor([0, 750]), torch.tensor([embodiment] * 2)
    with torch.no_grad():
        vl_embs, token = head.condition(features, state, rows)
        own_vl_embs, own_token = conditioner(features, state)
        assert torch.allclose(own_vl_embs, vl_embs)
        assert torch.allclose(own_token, token, atol=1e-6)
        tokens = head.encode_action(token, actions, timestep, rows)
        assert torch.allclose(encoder(token, actions, timestep), tokens, atol=1e-5)
        velocity = head.decode_velocity(output, rows)
        assert torch.allclose(decoder(output), velocity, atol=1e-6)
        other = head.decode_velocity(output, torch.tensor([1, 1]))
    assert not torch.allclose(velocity, other)
    assert sum(p.numel() for p in decoder.parameters()) * 3 == sum(
        p.numel() for p in head.action_decoder.parameters()
    )


def test_a_head_without_norm_and_positions_loads_and_runs(tiny: TinyCheckpoint) -> None:
    tiny.write_config(use_vlln=False, add_pos_embed=False)
    for key in [key for key in tiny.weights if "vlln" in key or "head.position" in key]:
        del tiny.weights[key]
    tiny.write_weights()
    model, _, _ = load_model(tiny.directory)
    features = torch.randn(1, 4, 16)
    with torch.no_grad():
        vl_embs, token = model.action_head.condition(
            features, torch.zeros(1, 7), torch.tensor([0])
        )
        assert torch.equal(vl_embs, features)
        encoder = around_dit(tiny, model, 0)[1]
        assert encoder(token, torch.zeros(1, 5, 6), torch.tensor([0])).shape == (1, 6, 24)


def test_the_denoising_loop_starts_from_its_noise_and_moves_by_the_velocity(
    model: GrootN16,
) -> None:
    given = inputs()
    noise = torch.randn((1, 5, 6), generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([1])
    with torch.no_grad():
        features, valid, image = model.backbone(
            given.input_ids, given.attention_mask, given.pixel_values
        )
        vl_embs, token = model.action_head.condition(features, given.state, rows)
        actions = noise
        for bucket in (0, 333, 666):
            velocity = model.action_head.velocity(
                vl_embs, token, actions, torch.tensor([bucket]), image, valid, rows
            )
            actions = actions + velocity / 3
    assert torch.allclose(model.get_action(given, noise, 3), actions, atol=1e-6)


def test_time_buckets_are_those_of_the_reference() -> None:
    assert [time_bucket(step, 4, 1000) for step in range(4)] == [0, 250, 500, 750]
    # int(7 / 25 * 1000) is 280, int(14 / 25 * 1000) is 560: no rounding below.
    assert [time_bucket(step, 25, 1000) for step in (7, 14)] == [280, 560]


def test_the_configured_epsilon_reaches_the_plain_norm_alone() -> None:
    # Tokens of so small a variance that an epsilon decides how large their norm comes out.
    tokens = 1e-3 * torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    time = torch.zeros(1, 8)
    usual, coarse = (
        Block(DiTConfig(heads=2, head_dim=4, norm_eps=eps), context_dim=8) for eps in (1e-5, 1e-2)
    )
    coarse.load_state_dict(usual.state_dict())
    assert torch.equal(usual.norm1(tokens, time), coarse.norm1(tokens, time))
    assert not torch.allclose(usual(tokens, time, None, None), coarse(tokens, time, None, None))
