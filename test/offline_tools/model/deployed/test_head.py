"""Hazards of the deployed head: a transformation that changes what is computed.

Each stage is compared with the one before it, on the golden checkpoint and on random ones in which
every weight and bias is drawn, so that a forgotten bias shows; the last one also with the actions
that the reference implementation recorded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from offline_tools.export.deployed_stages import REFERENCE, head_stages
from offline_tools.model.checkpoint import load_model
from offline_tools.model.configuration import load_model_config
from offline_tools.model.deployed.head import DEPLOYED_PARTS, UnrolledHead, head_builder
from offline_tools.model.deployed.transformations import HEAD

if TYPE_CHECKING:
    from test.offline_tools.model.conftest import TinyCheckpoint
    from test.offline_tools.model.deployed.conftest import HeadCase

IMAGE = 60


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def random_case(tiny: TinyCheckpoint, golden: HeadCase) -> HeadCase:
    config, _ = load_model_config(tiny.directory)
    generator = torch.Generator().manual_seed(3)
    ids = [5, 9, 11, *[IMAGE] * 6, 7, 8, *[IMAGE] * 6, 3]
    return replace(
        golden,
        config=config,
        checkpoint=tiny.weights.__getitem__,
        embodiment_id=1,
        ids=np.array(ids, np.int64),
        features=torch.randn((1, len(ids), 16), generator=generator),
        state=torch.randn((1, 7), generator=generator),
        noise=torch.randn((1, 5, 6), generator=generator),
        actions={},
    )


def test_every_transformation_is_listed_in_the_order_in_which_it_is_applied(
    golden_case: HeadCase,
) -> None:
    stages = head_stages(golden_case.config, golden_case.layout(), 2, "fp32")
    assert list(stages) == [REFERENCE, *HEAD]


@pytest.mark.parametrize("name", HEAD)
def test_transformation_computes_what_the_model_before_it_computes(
    golden_case: HeadCase, name: str
) -> None:
    steps = 2
    stages = head_stages(golden_case.config, golden_case.layout(), steps, "fp32")
    names = list(stages)
    before = golden_case.run(stages[names[names.index(name) - 1]], steps)
    after = golden_case.run(stages[name], steps)
    assert relative(after, before) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_vlln": False, "add_pos_embed": False},
        {"attend_text_every_n_blocks": 1},  # no block attends to image tokens
    ],
)
def test_transformations_hold_with_every_bias_drawn_and_with_parts_switched_off(
    tiny: TinyCheckpoint, golden_case: HeadCase, changes: dict[str, object]
) -> None:
    tiny.write_config(**changes)
    case = random_case(tiny, golden_case)
    steps = 3
    stages = head_stages(case.config, case.layout(), steps, "fp32")
    expected = case.run(stages[REFERENCE], steps)
    for name in HEAD:
        assert relative(case.run(stages[name], steps), expected) < 1e-5, name


def test_the_first_stage_is_the_reference_implementation(
    tiny: TinyCheckpoint, golden_case: HeadCase
) -> None:
    case = random_case(tiny, golden_case)
    model, _, _ = load_model(tiny.directory)
    given = case.inputs(case.layout())
    rows = given["embodiment_id"]
    with torch.no_grad():
        vl_embs, token = model.action_head.condition(given["all_features"], case.state, rows)
        masks = given["image_mask"], given["backbone_attention_mask"]
        expected = model.action_head.denoise(vl_embs, token, case.noise, *masks, rows, 3)
    stages = head_stages(case.config, case.layout(), 3, "fp32")
    assert relative(case.run(stages[REFERENCE], 3), expected) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_deployed_head_gives_the_recorded_actions(golden_case: HeadCase, steps: int) -> None:
    stages = head_stages(golden_case.config, golden_case.layout(), steps, "fp32")
    actions = golden_case.run(list(stages.values())[-1], steps)
    np.testing.assert_allclose(actions, golden_case.actions[steps], atol=1e-4)


@pytest.mark.parametrize("room", [0, 1, 40])
def test_padding_before_the_prefix_changes_nothing(golden_case: HeadCase, room: int) -> None:
    needed = golden_case.layout().prefix_length - 2
    layout = golden_case.layout(needed + room)
    graphs = list(head_stages(golden_case.config, layout, 2, "fp32").values())[-1]
    inputs = golden_case.inputs(layout)
    # What lies in the padding must not matter either.
    keys = inputs["prefix_text_keys"].clone()
    keys[:, :, :room] = 7.0
    actions = golden_case.run(graphs, 2, layout, prefix_text_keys=keys)
    np.testing.assert_allclose(actions, golden_case.actions[2], atol=1e-4)


def test_committed_rows_come_out_exactly_and_steer_the_free_ones(golden_case: HeadCase) -> None:
    layout = golden_case.layout()
    graphs = list(head_stages(golden_case.config, layout, 2, "fp32").values())[-1]
    free = golden_case.run(graphs, 2)
    given = golden_case.inputs(layout, committed=5)
    held = golden_case.run(graphs, 2, committed_mask=given["committed_mask"])
    assert torch.equal(held[:, :5], given["committed_actions"][:, :5])
    assert relative(held[:, 5:], free[:, 5:]) > 1e-3
    # What a row that is not committed would be set to must not be read.
    other = given["committed_actions"].clone()
    other[:, 5:] = float("nan")
    again = golden_case.run(
        graphs, 2, committed_mask=given["committed_mask"], committed_actions=other
    )
    assert torch.equal(again, held)


def test_nothing_committed_is_identical_to_a_head_without_that_input(
    golden_case: HeadCase,
) -> None:
    layout = golden_case.layout()
    stages = head_stages(golden_case.config, layout, 4, "fp32")
    names = list(stages)
    without = stages[names[names.index("committed_rows") - 1]]
    assert torch.equal(golden_case.run(stages["committed_rows"], 4), golden_case.run(without, 4))


def test_committed_rows_follow_the_straight_road_from_their_noise(golden_case: HeadCase) -> None:
    seen = []

    class Watched(DEPLOYED_PARTS.encoder):  # type: ignore[name-defined,misc]
        def forward(self, actions: torch.Tensor, step: int) -> torch.Tensor:
            seen.append(actions)
            result: torch.Tensor = super().forward(actions, step)
            return result

    layout = golden_case.layout()
    parts = replace(DEPLOYED_PARTS, encoder=Watched)
    graph = list(head_stages(golden_case.config, layout, 4, "fp32").values())[-1][0]
    spec = replace(graph.spec, build=head_builder(golden_case.config, layout, 4, parts))
    given = golden_case.inputs(layout, committed=3)
    golden_case.run((replace(graph, spec=spec),), 4, committed_mask=given["committed_mask"])
    for step, actions in enumerate(seen):
        time = step / 4
        road = (1 - time) * given["noise"] + time * given["committed_actions"]
        assert torch.allclose(actions[:, :3], road[:, :3]), step
        if step:
            assert not torch.allclose(actions[:, 3:], road[:, 3:])
    assert len(seen) == 4


def test_deployed_head_holds_no_weight_that_only_the_time_reads(golden_case: HeadCase) -> None:
    module = head_builder(golden_case.config, golden_case.layout(), 2)()
    assert isinstance(module, UnrolledHead)
    dit = golden_case.config.dit
    names = [name for name, _ in module.named_parameters()]
    assert not [name for name in names if "norm1.linear" in name or "timestep" in name]
    # A block: attention, MLP, their biases, and a scale and a shift for each of two steps.
    width = dit.width
    attention = 4 * width * width + 4 * width
    cross = 2 * width * width + 2 * width
    mlp = 8 * width * width + 5 * width
    norms = 2 * 2 * width
    blocks = [sum(p.numel() for p in block.parameters()) for block in module.transformer_blocks]
    expected = [(attention if i % 2 else cross) + mlp + norms for i in range(dit.layers)]
    assert blocks == expected
    context = sum(p.numel() for p in module.context.parameters())
    assert context == (dit.layers // 2) * 2 * width * (dit.cross_dim + 1)
