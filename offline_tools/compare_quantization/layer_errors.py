"""How far each quantised layer's output is from the float graph's, inside the running graph.

Owns: reading layer outputs out of two graphs with the same tensor names. Must not import a
quantiser. The error of a layer holds what all layers before it in the graph have added: it says
where a scheme goes wrong, not what the layer would cost alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from offline_tools.compare_quantization.samples import Feeds
from offline_tools.verify.comparison import Comparison, compare


def layer_errors(
    reference: Path, found: Path, tensors: Mapping[str, Sequence[str]], feeds: Feeds
) -> dict[str, Comparison]:
    """Compare layer outputs of two forms of one graph on the same inputs.

    Args:
        reference: The float graph.
        found: Its quantised form.
        tensors: Layer to the names of its outputs in the float graph, one a use. A layer whose
            outputs the other graph does not have by these names is left out.
        feeds: Inputs of the float graph. All outputs of all feeds are held in memory.

    Returns:
        Layer to the comparison over all feeds at once, in the order of `tensors`.
    """
    present = _tensor_names(found)
    kept = {layer: names for layer, names in tensors.items() if present.issuperset(names)}
    asked = [name for names in kept.values() for name in names]
    wanted, got = (
        dict(zip(asked, _run(graph, asked, feeds), strict=True)) for graph in (reference, found)
    )
    return {
        layer: compare(
            layer,
            np.concatenate([wanted[name] for name in names]),
            np.concatenate([got[name] for name in names]),
        )
        for layer, names in kept.items()
    }


def _tensor_names(graph: Path) -> set[str]:
    model = onnx.load(str(graph), load_external_data=False)
    return {name for node in model.graph.node for name in node.output}


def _run(graph: Path, names: list[str], feeds: Feeds) -> list[NDArray[Any]]:
    """Return each tensor's values over all feeds, flattened."""
    model = onnx.load(str(graph), load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in outputs
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent.absolute())
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values: list[list[NDArray[Any]]] = [[] for _ in names]
    for feed in feeds:
        for collected, value in zip(values, session.run(names, feed), strict=True):
            collected.append(value.astype(np.float32, copy=False).ravel())
    return [np.concatenate(collected) for collected in values]
