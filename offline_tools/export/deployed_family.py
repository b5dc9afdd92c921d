"""The deployed graphs of a bundle, put together.

Owns: which graphs a deployed bundle is written with. What each is traced from is said by
`deployed_backbone` and `deployed_graphs`.
"""

from __future__ import annotations

from collections.abc import Sequence

from groot_int8_ros.policy.families import PREFIX_GRAPH
from groot_int8_ros.policy.processor import ImageChain
from groot_int8_ros.policy.token_layout import TokenLayout
from groot_int8_ros.policy.types import CameraSpec
from offline_tools.export.deployed_backbone import deployed_backbone, prefix_model
from offline_tools.export.deployed_graphs import deployed_head
from offline_tools.export.graph import WeightSource
from offline_tools.export.graphs import ReferenceGraph
from offline_tools.model.configuration import ModelConfig


def deployed_graphs(
    config: ModelConfig,
    checkpoint: WeightSource,
    *,
    cameras: Sequence[CameraSpec],
    image_chain: ImageChain,
    embodiment_id: int,
    layout: TokenLayout,
    denoising_steps: int,
    precision: str,
    with_prefix_model: bool,
) -> dict[str, ReferenceGraph]:
    """Describe the deployed graphs of a bundle, by the names of `families.GRAPH_FILES`.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        cameras: In the processor's order, with the size of their frames.
        image_chain: Scaling and cropping of the frames.
        embodiment_id: Row of the category-specific weights.
        layout: Where the prompt's tokens stand.
        denoising_steps: Euler steps that are unrolled.
        precision: `fp32` or `fp16`.
        with_prefix_model: Whether the prefix model is among them.
    """
    graphs = {
        "backbone": deployed_backbone(
            config,
            checkpoint,
            cameras=cameras,
            image_chain=image_chain,
            layout=layout,
            precision=precision,
        ),
        "action_head": deployed_head(
            config,
            checkpoint,
            embodiment_id=embodiment_id,
            layout=layout,
            denoising_steps=denoising_steps,
            precision=precision,
        ),
    }
    if with_prefix_model:
        graphs[PREFIX_GRAPH] = prefix_model(config, checkpoint, precision_of_storage=precision)
    return graphs
