"""The cost table: what an observation costs after each transformation.

Owns: the setup that is counted, the prompt's layout for it, and the lines of the table. Needs
torch, and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.processor import ImageChain
from groot_int8_ros.policy.token_layout import TokenLayout
from groot_int8_ros.policy.types import CameraSpec
from offline_tools.cost.torch_count import count_stage
from offline_tools.cost.work import GraphWork
from offline_tools.export.deployed_stages import (
    REFERENCE,
    StageGraph,
    backbone_stages,
    head_stages,
)
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.backbone import BackboneCase

# After each image but the last: its end, `<image k>` of the next as five tokens, its begin.
_BETWEEN_IMAGES = 7
# The last image's end, the message's end and a newline.
_AFTER_IMAGES = 3
# As released checkpoints have it.
_CHAIN = ImageChain(shortest_image_edge=256, crop_fraction=0.95)


@dataclass(frozen=True)
class Setup:
    """What is counted.

    Attributes:
        cameras: Number of cameras.
        frame: Height and width of the cameras' frames in pixels.
        text_tokens: Tokens of the prompt beside those of the images.
        steps: Denoising steps.
        precision: `fp32` or `fp16`.
    """

    cameras: int = 4
    frame: tuple[int, int] = (576, 640)
    text_tokens: int = 51
    steps: int = 2
    precision: str = "fp16"

    def case(self, config: ModelConfig) -> BackboneCase:
        """Return the cameras and a prompt of these lengths.

        Raises:
            ConfigurationError: There are fewer text tokens than stand between the images.
            ProcessorError: The frames are of a size that the image chain does not take.
        """
        prefix = self.text_tokens - (_BETWEEN_IMAGES * (self.cameras - 1) + _AFTER_IMAGES)
        if prefix < 1:
            raise ConfigurationError(
                f"{self.cameras} images need more than {self.text_tokens} text tokens; give "
                f"--text-tokens {self.text_tokens - prefix + 1} or more"
            )
        return made_case(config, self.cameras, self.frame, prefix)


def made_case(
    config: ModelConfig, cameras: int, frame: tuple[int, int], prefix_tokens: int
) -> BackboneCase:
    """Return equal cameras and a prompt with made-up text, as the image chain and layout want.

    Args:
        config: Of the model.
        cameras: Number of cameras.
        frame: Height and width of their frames in pixels.
        prefix_tokens: Tokens before the first image.

    Raises:
        ProcessorError: The frames are of a size that the image chain does not take.
    """
    specs = tuple(CameraSpec(f"camera_{number}", *frame) for number in range(cameras))
    image = config.language.image_token_id
    text = 0 if image else 1
    shown = [image] * image_sizes(*frame, _CHAIN).tokens
    live = shown + ([text] * _BETWEEN_IMAGES + shown) * (cameras - 1) + [text] * _AFTER_IMAGES
    return BackboneCase(config, specs, _CHAIN, TokenLayout(prefix_tokens, tuple(live), image))


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: The transformation that led here.
        backbone: The backbone's graphs.
        head: The action head's graphs.
    """

    name: str
    backbone: tuple[GraphWork, ...]
    head: tuple[GraphWork, ...]

    @property
    def graphs(self) -> tuple[GraphWork, ...]:
        """All graphs of an observation."""
        return *self.backbone, *self.head


def cost_lines(config: ModelConfig, setup: Setup) -> list[Line]:
    """Count the model after each transformation: those of the backbone, then the head's."""
    case = setup.case(config)
    backbones = backbone_stages(case, setup.precision)
    heads = head_stages(config, case.layout, setup.steps, setup.precision)
    head = _count(heads.pop(REFERENCE))
    backbone: tuple[GraphWork, ...] = ()
    lines = []
    for name, graphs in backbones.items():
        backbone = _count(graphs)
        lines.append(Line(name, backbone, head))
    for name, graphs in heads.items():
        lines.append(Line(name, backbone, _count(graphs)))
    return lines


def _count(graphs: tuple[StageGraph, ...]) -> tuple[GraphWork, ...]:
    return tuple(count_stage(graph) for graph in graphs)
