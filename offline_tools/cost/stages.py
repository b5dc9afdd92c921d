"""The cost table: what an observation costs after each transformation.

Owns: the setup that is counted, the prompt's layout for it, and the lines of the table. Needs
torch, and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.cost.torch_count import count_stage
from offline_tools.cost.work import GraphWork
from offline_tools.export.deployed_stages import (
    REFERENCE,
    StageGraph,
    backbone_stages,
    head_stages,
)
from offline_tools.model.configuration import ModelConfig

# After each image but the last: its end, `<image k>` of the next as five tokens, its begin.
_BETWEEN_IMAGES = 7
# The last image's end, the message's end and a newline.
_AFTER_IMAGES = 3
_PATCHES_PER_TOKEN = 4


@dataclass(frozen=True)
class Setup:
    """What is counted.

    Attributes:
        cameras: Number of cameras.
        image_shape: Height and width of the network's images in pixels.
        text_tokens: Tokens of the prompt beside those of the images.
        steps: Denoising steps.
        precision: `fp32` or `fp16`.
    """

    cameras: int = 4
    image_shape: tuple[int, int] = (252, 280)
    text_tokens: int = 51
    steps: int = 2
    precision: str = "fp16"

    def layout(self, config: ModelConfig) -> TokenLayout:
        """Return a prompt of these lengths.

        Raises:
            ConfigurationError: The images do not divide into patches, or there are fewer text
                tokens than stand between the images.
        """
        side = 2 * config.vision.patch_size
        height, width = self.image_shape
        if height % side or width % side:
            raise ConfigurationError(
                f"images of {height}x{width} do not divide into tokens of {side} pixels"
            )
        per_image = height * width // (config.vision.patch_size**2 * _PATCHES_PER_TOKEN)
        image, text = config.language.image_token_id, config.language.image_token_id + 1
        live: list[int] = []
        for camera in range(self.cameras):
            last = camera == self.cameras - 1
            live += [image] * per_image
            live += [text] * (_AFTER_IMAGES if last else _BETWEEN_IMAGES)
        prefix = self.text_tokens - (len(live) - self.cameras * per_image)
        if prefix < 1:
            raise ConfigurationError(
                f"{self.cameras} images need more than {self.text_tokens} text tokens; give "
                f"--text-tokens {self.text_tokens - prefix + 1} or more"
            )
        return TokenLayout(prefix, tuple(live), image)


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
    layout = setup.layout(config)
    backbones = backbone_stages(config, layout, setup.cameras, setup.image_shape, setup.precision)
    heads = head_stages(config, layout, setup.steps, setup.precision)
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
