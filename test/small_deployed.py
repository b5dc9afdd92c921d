"""A deployed bundle whose graphs are a few sums: real files, real engines, no torch.

What a bundle promises about names, types, shapes and prefixes can be tried on it in a second;
what the graphs of GR00T compute is tested on exported ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.parser

from groot_int8_ros.policy.bundle import PROCESSOR_FILES, TOKENIZER_FILE, Bundle, open_bundle
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.prefix_model import compute_prefix
from groot_int8_ros.policy.token_layout import layout_of

PREFIX_LENGTH = 32
INSTRUCTIONS = ("pick up the cube", "put it down")

_HEADER = '<ir_version: 8, opset_import: ["": 17]>'
_LANGUAGE = "2,1,{tokens},3"
_TEXT = "1,2,{tokens},2"


def _backbone(bundle: Bundle, live: int) -> str:
    cameras = bundle.manifest.robot.cameras
    images = ", ".join(f"uint8[{c.height},{c.width},3] image_{c.key}" for c in cameras)
    language = _LANGUAGE.format(tokens=PREFIX_LENGTH)
    steps = "".join(
        f"""
        real_{n} = Cast<to = 1>(image_{camera.key})
        mean_{n} = ReduceMean<keepdims = 0>(real_{n})
        weight_{n} = Constant<value_float = {n + 1}.0>()
        part_{n} = Mul(mean_{n}, weight_{n})"""
        for n, camera in enumerate(cameras)
    )
    parts = ", ".join(f"part_{n}" for n in range(len(cameras)))
    return f"""{_HEADER} backbone ({images}, float[{language}] prefix_keys,
        float[{language}] prefix_values, bool[{PREFIX_LENGTH}] prefix_mask)
        => (float[1,{live},4] features) {{
        {steps}
        {_masked("keys", "prefix_keys")}
        {_masked("values", "prefix_values")}
        both = Sub(sum_keys, sum_values)
        pixels = Sum({parts})
        sum = Add(pixels, both)
        shape = Constant<value = int64[3] {{1, {live}, 4}}>()
        features = Expand(sum, shape)
    }}"""


def _action_head(bundle: Bundle, live: int) -> str:
    horizon, width = bundle.manifest.action_horizon, bundle.processor.max_action_dim
    text = _TEXT.format(tokens=PREFIX_LENGTH)
    return f"""{_HEADER} action_head (float[1,{live},4] features,
        float[{text}] prefix_text_keys, float[{text}] prefix_text_values,
        bool[{PREFIX_LENGTH}] prefix_mask, float[1,{bundle.processor.max_state_dim}] state,
        float[1,{horizon},{width}] noise, float[1,{horizon},{width}] committed_actions,
        bool[1,{horizon}] committed_mask) => (float[1,{horizon},{width}] action_pred) {{
        {_masked("keys", "prefix_text_keys")}
        {_masked("values", "prefix_text_values")}
        both = Sub(sum_keys, sum_values)
        seen = ReduceMean<keepdims = 0>(features)
        felt = ReduceMean<keepdims = 0>(state)
        scale = Constant<value_float = 0.001>()
        little = Mul(seen, scale)
        shift = Sum(little, felt, both)
        moved = Add(noise, shift)
        last = Constant<value = int64[1] {{2}}>()
        rows = Unsqueeze(committed_mask, last)
        action_pred = Where(rows, committed_actions, moved)
    }}"""


def _masked(name: str, tensor: str) -> str:
    return f"""
        real_{name} = Cast<to = 1>(prefix_mask)
        shape_{name} = Constant<value = int64[4] {{1, 1, {PREFIX_LENGTH}, 1}}>()
        mask_{name} = Reshape(real_{name}, shape_{name})
        kept_{name} = Mul({tensor}, mask_{name})
        sum_{name} = ReduceSum<keepdims = 0>(kept_{name})"""


def _prefix() -> str:
    language, text = _LANGUAGE.format(tokens="tokens"), _TEXT.format(tokens="tokens")
    return f"""{_HEADER} prefix (int64[1,tokens] input_ids, int64[1] first_position)
        => (float[{language}] prefix_keys, float[{language}] prefix_values,
            float[{text}] prefix_text_keys, float[{text}] prefix_text_values) {{
        ids = Cast<to = 1>(input_ids)
        first = Cast<to = 1>(first_position)
        places = Add(ids, first)
        column = Constant<value = int64[4] {{1, 1, -1, 1}}>()
        tokens4 = Reshape(places, column)
        scale = Constant<value_float = 0.01>()
        small = Mul(tokens4, scale)
        wave = Sin(small)
        language = Constant<value = int64[4] {{2, 1, 1, 3}}>()
        text = Constant<value = int64[4] {{1, 2, 1, 2}}>()
        prefix_keys = Expand(small, language)
        prefix_values = Expand(wave, language)
        prefix_text_keys = Expand(small, text)
        prefix_text_values = Expand(wave, text)
    }}"""


def write_small_deployed(folder: Path, like: Path, *, prefix_model: bool = True) -> Path:
    """Write the bundle.

    Args:
        folder: Where to.
        like: A bundle whose robot, processor files and tokenizer it takes.
        prefix_model: Whether it can compute new instructions.
    """
    model = open_bundle(like, verify_hashes=False)
    preprocessor = model.preprocessor()
    ids = preprocessor.prompt_ids("task")
    live = layout_of(ids.tolist(), preprocessor.image_token_id, PREFIX_LENGTH).live_length
    (folder / "onnx").mkdir(parents=True)
    for name in (TOKENIZER_FILE, *PROCESSOR_FILES):
        shutil.copyfile(like / name, folder / name)
    texts = {
        "backbone": _backbone(model, live),
        "action_head": _action_head(model, live),
        "prefix": _prefix(),
    }
    graphs: dict[str, Any] = {}
    for name, text in texts.items():
        path = folder / "onnx" / f"{name}.onnx"
        parsed = onnx.parser.parse_model(text)
        onnx.checker.check_model(parsed)
        onnx.save(parsed, str(path))
        engine = OnnxRuntimeEngine(path)
        graphs[name] = {
            "file": f"onnx/{name}.onnx",
            "precision": "fp32",
            "inputs": _specs(engine.inputs),
            "outputs": _specs(engine.outputs),
        }
        engine.close()
    content = json.loads((like / "manifest.json").read_text())
    content |= {"family": "deployed", "graphs": graphs, "files": _files(folder)}
    content["prompts"] = {"length": PREFIX_LENGTH, "instructions": []}
    (folder / "manifest.json").write_text(json.dumps(content))
    opened = open_bundle(folder)
    for text in INSTRUCTIONS:
        prefix = compute_prefix(opened, text, threads=1)
        (folder / "prompts").mkdir(exist_ok=True)
        prefix.write(folder / prefix.file)
        content["prompts"]["instructions"].append(
            {"text": text, "file": prefix.file, "tokens": prefix.input_ids.size}
        )
    if not prefix_model:
        del graphs["prefix"]
        (folder / "onnx" / "prefix.onnx").unlink()
    content["files"] = _files(folder)
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def _specs(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    return {name: {"dtype": s.dtype, "shape": list(s.shape)} for name, s in specs.items()}


def _files(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
