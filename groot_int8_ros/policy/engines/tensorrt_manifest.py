"""What stands beside a TensorRT engine: what it was built from, with what, and for which device.

Owns: `EngineManifest`, where engines lie in a bundle, and the refusal of one that does not fit.
Must not import TensorRT, CUDA or torch: a refusal costs no GPU memory.

Layout, `bundle/engines/<TensorRT version>-<device>-sm<compute capability>/`::

    dit_model.engine      what TensorRT serialised
    dit_model.json        this module's `EngineManifest`
    dit_model.layers.json what TensorRT's engine inspector says, where a GPU was there to ask
    timing.cache          measured kernels, which make the next build shorter
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.engines.cuda import Device
from groot_int8_ros.policy.files import check_types, read_json, sha256_of_file

ENGINE_SCHEMA_VERSION = 1
ENGINE_FOLDER = "engines"
ENGINE_SUFFIX = ".engine"
# Boards of one name differ in memory; what the firmware sets aside differs by less than this.
_SAME_MEMORY = 0.2
# What the JSON must hold where a refusal looks at it.
_MANIFEST_TYPES: Mapping[str, type] = {
    "graph": str,
    "graph_sha256": dict,
    "engine_sha256": str,
    "engine_bytes": int,
    "device_memory_bytes": int,
    "layer_precision": dict,
    "calibration": dict,
    "library_version": str,
}
_DEVICE_TYPES: Mapping[str, type] = {
    "name": str,
    "compute_capability": str,
    "multiprocessors": int,
    "memory_bytes": int,
}


@dataclass(frozen=True)
class EngineTensor:
    """One input or output of an engine.

    Attributes:
        spec: The graph's own dtype and shape, which is what `Engine.run` takes and gives.
        profile: Smallest, best and largest shape, equal for a fixed one. For an output only the
            last has a meaning: the shape at the largest inputs.
    """

    spec: TensorSpec
    profile: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None


@dataclass(frozen=True)
class EngineManifest:
    """What a build wrote beside its engine.

    Attributes:
        graph: The graph's file inside the bundle.
        graph_sha256: Hash of each file the graph consists of, by its path inside the bundle.
        engine_sha256: Hash of the engine.
        engine_bytes: Its size.
        device_memory_bytes: Activation memory that running takes beside the weights; 0 if no GPU
            was there to ask.
        precision: What the build asked for: `fp32`, `fp16`, `bf16` or `int8`.
        quantization: `none`, `qdq` or `calibrator`.
        layer_precision: Verdict of the layer audit by layer name, if a GPU was there to ask.
        calibration: Hashes of what the scales came from: `cache_sha256`, `samples_sha256`.
        library: `tensorrt`, as Python calls it.
        library_version: Its version.
        device: The device it was built for.
        inputs: By name, as the graph has them.
        outputs: By name.
        build_options: Options that give the same engine again, for `groot-int8 build`.
        build_flags: What the builder was configured with, for a person.
        seconds: Wall time of the build.
        peak_memory_bytes: Peak resident memory of the build's process.
    """

    graph: str
    graph_sha256: Mapping[str, str]
    engine_sha256: str
    engine_bytes: int
    device_memory_bytes: int
    precision: str
    quantization: str
    layer_precision: Mapping[str, str]
    calibration: Mapping[str, str]
    library: str
    library_version: str
    device: Device
    inputs: Mapping[str, EngineTensor]
    outputs: Mapping[str, EngineTensor]
    build_options: tuple[str, ...]
    build_flags: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> str:
        """Return the manifest as it stands beside the engine."""
        content = {
            "schema_version": ENGINE_SCHEMA_VERSION,
            **{
                name: getattr(self, name)
                for name in self.__dataclass_fields__
                if name not in {"device", "inputs", "outputs"}
            },
            "device": vars(self.device),
            "inputs": {name: _tensor_to_dict(tensor) for name, tensor in self.inputs.items()},
            "outputs": {name: _tensor_to_dict(tensor) for name, tensor in self.outputs.items()},
        }
        return json.dumps(content, indent=2) + "\n"


def engine_folder(bundle: Path, library_version: str, device: Device) -> Path:
    """Return the folder of a bundle that holds the engines of one TensorRT and one device."""
    capability = device.compute_capability.replace(".", "")
    return bundle / ENGINE_FOLDER / f"{library_version}-{device.slug}-sm{capability}"


def find_engine(bundle: Path, graph: Path, library_version: str, device: Device) -> Path:
    """Return the engine of a graph for one TensorRT and one device.

    Args:
        bundle: The bundle's folder.
        graph: The graph's `.onnx` file.
        library_version: TensorRT's version.
        device: The GPU.

    Raises:
        EngineError: None was built for them.
    """
    path = engine_folder(bundle, library_version, device) / (graph.stem + ENGINE_SUFFIX)
    if path.is_file():
        return path
    others = sorted(
        str(other.parent.relative_to(bundle))
        for other in (bundle / ENGINE_FOLDER).glob(f"*/{path.name}")
    )
    raise EngineError(
        f"{path} does not exist: no engine was built for TensorRT {library_version} on "
        f"{device.describe()}"
        + (f"; there is one in {', '.join(others)}, for another" if others else "")
        + f". Build it here: {rebuild_command(bundle)}"
    )


def rebuild_command(bundle: Path, options: tuple[str, ...] = ()) -> str:
    """Return the command line that builds a bundle's engines on this machine."""
    return shlex.join(["groot-int8", "build", "--bundle", str(bundle), *options])


def without_options(
    words: Iterable[str], with_value: Collection[str], flags: Collection[str]
) -> tuple[str, ...]:
    """Return a command line's options without some of them.

    Args:
        words: The options.
        with_value: Those that are left out with the word behind them.
        flags: Those that are left out alone.
    """
    kept = []
    rest = iter(words)
    for word in rest:
        if word in with_value:
            next(rest, None)
        elif word not in flags:
            kept.append(word)
    return tuple(kept)


def read_engine_manifest(path: Path, bundle: Path) -> EngineManifest:
    """Read the manifest of an engine.

    Args:
        path: The `.json` beside the engine.
        bundle: The bundle, for the command that builds it again.

    Raises:
        EngineError: The file is missing, damaged or of another schema.
    """
    again = f"Build it again: {rebuild_command(bundle)}"
    if not path.is_file():
        raise EngineError(f"the engine has no manifest {path}. {again}")
    try:
        content = read_json(path)
        schema = content["schema_version"]
        if schema != ENGINE_SCHEMA_VERSION:
            raise ValueError(f"its schema version is {schema!r}, not {ENGINE_SCHEMA_VERSION}")
        fields = {name: content[name] for name in EngineManifest.__dataclass_fields__}
        fields["device"] = Device(**fields["device"])
        for direction in ("inputs", "outputs"):
            fields[direction] = {
                name: _tensor_from_dict(record) for name, record in fields[direction].items()
            }
        for name in ("build_options", "build_flags"):
            fields[name] = tuple(str(option) for option in fields[name])
        manifest = EngineManifest(**fields)
        for what, types in ((manifest, _MANIFEST_TYPES), (manifest.device, _DEVICE_TYPES)):
            check_types(what, types)
            for name, kind in types.items():
                if kind is int and getattr(what, name) >> 63:
                    raise ValueError(f"{name} is negative, or has more than 63 bits")
        if manifest.graph not in manifest.graph_sha256:
            raise ValueError("it does not say which graph the engine was built from")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise EngineError(f"{path} is damaged: {reason}. {again}") from error


def check_engine_fits(
    manifest: EngineManifest,
    engine: Path,
    bundle: Path,
    *,
    library_version: str,
    device: Device,
    recorded_sha256: Mapping[str, str],
    verify_hash: bool = True,
) -> None:
    """Refuse an engine of another TensorRT, device or graph, or one that changed on disk.

    Args:
        manifest: The engine's manifest.
        engine: The engine's file.
        bundle: The bundle's folder.
        library_version: Version of the TensorRT here.
        device: The device here.
        recorded_sha256: Hash of every file in the bundle's own manifest.
        verify_hash: Read the engine and compare its hash; False compares the size alone.

    Raises:
        EngineError: It does not fit; the message ends with the command that rebuilds it.
    """
    again = f"Build it again: {rebuild_command(bundle, manifest.build_options)}"
    if manifest.library_version != library_version:
        raise EngineError(
            f"{engine} was built with TensorRT {manifest.library_version}, and this is "
            f"{library_version}, which reads its own engines alone. {again}"
        )
    if not _same_device(manifest.device, device):
        raise EngineError(
            f"{engine} was built for {manifest.device.describe()}, and this is "
            f"{device.describe()}; an engine runs on its own device alone (on a Jetson the power "
            f"mode counts too: nvpmodel -q). {again}"
        )
    for file, sha256 in manifest.graph_sha256.items():
        if recorded_sha256.get(file) != sha256:
            raise EngineError(
                f"{engine} was built from another {file} than the bundle has now. {again}"
            )
    try:
        found = engine.stat().st_size
        if found != manifest.engine_bytes:
            raise EngineError(
                f"{engine} has {found} bytes instead of {manifest.engine_bytes}: it is truncated "
                f"or from another build. {again}"
            )
        if verify_hash and sha256_of_file(engine) != manifest.engine_sha256:
            raise EngineError(
                f"{engine} is not the file that was built (SHA-256 differs). {again}"
            )
    except OSError as error:
        raise EngineError(f"{engine} cannot be read: {error.strerror}. {again}") from error


def _same_device(built_for: Device, here: Device) -> bool:
    same = (built_for.name, built_for.compute_capability, built_for.multiprocessors) == (
        here.name,
        here.compute_capability,
        here.multiprocessors,
    )
    return same and abs(built_for.memory_bytes / here.memory_bytes - 1) < _SAME_MEMORY


def _tensor_to_dict(tensor: EngineTensor) -> dict[str, Any]:
    return {
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
        "profile": tensor.profile and [list(shape) for shape in tensor.profile],
    }


def _tensor_from_dict(record: Mapping[str, Any]) -> EngineTensor:
    profile = record["profile"]
    if profile is not None:
        smallest, best, largest = (tuple(int(axis) for axis in shape) for shape in profile)
        profile = (smallest, best, largest)
    return EngineTensor(TensorSpec(str(record["dtype"]), tuple(record["shape"])), profile)
