"""A deployed backbone cut in two behind its image chain, so that each half is judged by itself.

Owns: finding the place and running the halves. Must not import torch. The graph in the bundle is
what is cut: the halves share its weights where they lie, and nothing is traced again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.utils import Extractor

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.onnxruntime_engine import session_options
from groot_int8_ros.policy.types import Float32Array

# Where ONNX Runtime looks for the weights of a model that it is given as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class CutBackbone:
    """Frames to pixels, and pixels to features."""

    def __init__(self, path: Path, pixel_shape: tuple[int, int, int, int]) -> None:
        """Find the place.

        Args:
            path: The backbone's `.onnx` file.
            pixel_shape: Shape (cameras, 3, H, W) of what the image chain gives.

        Raises:
            EngineError: There is no such tensor.
        """
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
        self._folder = path.parent
        self._extractor = Extractor(model)
        shapes = {
            value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
            for value in model.graph.value_info
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        cameras, colours, *size = pixel_shape
        # The exporter joins reshapes, so cameras and colours may be one axis.
        wanted = {pixel_shape, (cameras * colours, *size)}
        found = [
            name for node in model.graph.node for name in node.output if shapes.get(name) in wanted
        ]
        if not found:
            raise EngineError(
                f"{path} has no float32 tensor of the shape {list(pixel_shape)} that the image "
                "chain gives: it is no deployed backbone of this bundle. Export it again."
            )
        self._pixels = found[-1]
        self._own_shape = shapes[self._pixels]
        self._pixel_shape = pixel_shape
        self._frames = [
            value.name
            for value in model.graph.input
            if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        ]
        self._others = [v.name for v in model.graph.input if v.name not in self._frames]

    def pixels(self, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> list[Float32Array]:
        """Run the image chain.

        Args:
            feeds: The backbone's inputs, once for each observation.

        Returns:
            Pixels in [-1, 1], float32 (cameras, 3, H, W) each.
        """
        session = self._session(self._frames, [self._pixels])
        found = [session.run(None, {n: one[n] for n in self._frames})[0] for one in feeds]
        return [pixels.reshape(self._pixel_shape) for pixels in found]

    def features(
        self, feeds: Sequence[Mapping[str, NDArray[Any]]], pixels: Sequence[Float32Array]
    ) -> list[NDArray[Any]]:
        """Run everything behind the image chain.

        Args:
            feeds: The backbone's inputs, of which the frames are left out.
            pixels: What stands in for the image chain's answer.

        Returns:
            Features (1, L, D) of each.
        """
        session = self._session([self._pixels, *self._others], ["features"])
        return [
            session.run(
                None,
                {
                    self._pixels: pixel.reshape(self._own_shape),
                    **{name: one[name] for name in self._others},
                },
            )[0]
            for one, pixel in zip(feeds, pixels, strict=True)
        ]

    def _session(self, inputs: list[str], outputs: list[str]) -> ort.InferenceSession:
        part = self._extractor.extract_model(inputs, outputs)
        options = session_options()
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(self._folder))
        return ort.InferenceSession(
            part.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
