"""The bundle: the folder in which the workstation's half and the robot's half meet.

Owns: the manifest's schema, reading, verifying and refusing it. Must not import ROS, torch or an
engine. Everything is checked before anything large is loaded, and a mismatch is an error that
says which command makes the wrong part again; there is no silent fallback.

Layout::

    manifest.json             this module's `Manifest`
    processor_config.json     the checkpoint's own processor files, unchanged
    statistics.json
    embodiment_id.json
    tokenizer.json
    onnx/*.onnx, *.onnx.data  the graphs of one family (`families`)
    prompts/*.npz             prefixes of instructions (`prompt_bank`), of deployed graphs alone
    engines/                  TensorRT engines, each with a manifest of its own: they belong to a
                              device, so they are no part of the verified content either
    reports/                  what later steps found out; not part of the verified content
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groot_int8_ros import __version__
from groot_int8_ros.errors import BundleError, ConfigurationError
from groot_int8_ros.policy.engines.base import Engine, TensorSpec
from groot_int8_ros.policy.families import (
    DEPLOYED,
    FAMILIES,
    PREFIX_GRAPH,
    deployed_fault,
    engine_graphs,
)
from groot_int8_ros.policy.files import leads_outside, read_json, sha256_of_file
from groot_int8_ros.policy.processor import Processor, load_processor
from groot_int8_ros.policy.prompt_bank import PromptRecords, parse_prompts
from groot_int8_ros.policy.quantization import QuantizationRecord, parse_record
from groot_int8_ros.policy.robot import RobotDescription, parse_robot

if TYPE_CHECKING:
    from groot_int8_ros.policy.preprocess import Preprocessor

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
PROCESSOR_FILES = ("processor_config.json", "statistics.json", "embodiment_id.json")
GRAPH_FOLDER = "onnx"

PRECISIONS = ("fp32", "fp16", "int8")

_EXPORT_AGAIN = (
    "Export it again: groot-int8 export --checkpoint CHECKPOINT --bundle {folder} --force"
)
# An export into its folder would put a float bundle in its place.
_QUANTIZE_AGAIN = (
    "It is an INT8 bundle: quantise its float bundle again: groot-int8 quantize --bundle "
    "FLOAT_BUNDLE --calibration CAPTURES --output NEW_FOLDER"
)


@dataclass(frozen=True)
class GraphRecord:
    """One graph of the bundle.

    Attributes:
        file: Path inside the bundle.
        precision: One of `PRECISIONS`: the type of the weights; of an `int8` graph, that of the
            layers that its quantisation record names.
        inputs: Specs by input name.
        outputs: Specs by output name.
        quantization: How the graph was quantised; present exactly where the precision is `int8`.
    """

    file: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    quantization: QuantizationRecord | None = None


@dataclass(frozen=True)
class Manifest:
    """What the bundle holds and what it was made from.

    Attributes:
        exporter_version: Version of this package that wrote the bundle.
        checkpoint_sha256: Hash over the checkpoint's weight, configuration and processor files.
        family: Which graphs it holds, one of `families.FAMILIES`.
        embodiment: Embodiment tag of the processor files that the bundle serves.
        robot: Cameras, joints and action period.
        action_horizon: Action tokens that the model runs.
        denoising_steps: Euler steps at inference; deployed graphs have them unrolled.
        timestep_buckets: Number of integer time buckets of the flow.
        graphs: Graph name to its record; see `families.GRAPH_FILES`.
        files: Path inside the bundle to (SHA-256, size in bytes), for every file but the manifest
            and the reports.
        prompts: The bank of instructions; present exactly where the graphs are deployed ones.
        notes: What the exporter had to decide and the user should know.
    """

    exporter_version: str
    checkpoint_sha256: str
    family: str
    embodiment: str
    robot: RobotDescription
    action_horizon: int
    denoising_steps: int
    timestep_buckets: int
    graphs: Mapping[str, GraphRecord]
    files: Mapping[str, tuple[str, int]]
    prompts: PromptRecords | None = None
    notes: tuple[str, ...] = ()

    @property
    def engine_graphs(self) -> tuple[str, ...]:
        """Names of the graphs that an engine runs, in the order of the runs."""
        return engine_graphs(self.family)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Integer time of each Euler step, from 0 to below `timestep_buckets`."""
        steps, buckets = self.denoising_steps, self.timestep_buckets
        return tuple(int(step / steps * buckets) for step in range(steps))

    @property
    def is_quantized(self) -> bool:
        """Whether a graph is INT8, so that `groot-int8 quantize` made the bundle."""
        return any(graph.quantization is not None for graph in self.graphs.values())

    def files_of(self, graph: str) -> tuple[str, ...]:
        """Return the files a graph consists of: itself and its external data."""
        own = self.graphs[graph].file
        return tuple(name for name in self.files if name == own or name.startswith(f"{own}."))

    @property
    def has_prefix_model(self) -> bool:
        """Whether the prefix of a new instruction can be computed with the bundle alone."""
        return PREFIX_GRAPH in self.graphs

    def to_json(self) -> str:
        """Return the manifest as it stands in `manifest.json`."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "exporter_version": self.exporter_version,
            "checkpoint_sha256": self.checkpoint_sha256,
            "family": self.family,
            "embodiment": self.embodiment,
            "robot": self.robot.to_dict(),
            "action_horizon": self.action_horizon,
            "denoising_steps": self.denoising_steps,
            "timestep_buckets": self.timestep_buckets,
            "graphs": {name: _graph_to_dict(graph) for name, graph in self.graphs.items()},
            "files": {
                name: {"sha256": sha256, "bytes": size}
                for name, (sha256, size) in self.files.items()
            },
            **({} if self.prompts is None else {"prompts": self.prompts.to_dict()}),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=2) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified.

    Attributes:
        folder: Where it lies.
        manifest: Its manifest.
        processor: The embodiment's observation and action conventions.
    """

    folder: Path
    manifest: Manifest
    processor: Processor

    def graph_path(self, name: str) -> Path:
        """Return the file of one of the manifest's graphs."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def make_again(self) -> str:
        """The sentence that says which command makes it again."""
        return _make_again(self.folder, is_quantized=self.manifest.is_quantized)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / TOKENIZER_FILE

    def preprocessor(self) -> Preprocessor:
        """Return the observation chain of the bundle's cameras and tokenizer.

        Raises:
            ProcessorError: The tokenizer is of another model, or the cameras do not fit together.
        """
        # Here, because it brings OpenCV: a machine that only builds engines does without.
        from groot_int8_ros.policy.preprocess import Preprocessor, PromptTokenizer

        tokenizer = PromptTokenizer.from_file(self.tokenizer_path)
        return Preprocessor(self.processor, tokenizer, self.manifest.robot.cameras)

    def check_engine(self, name: str, engine: Engine) -> None:
        """Refuse an engine whose inputs or outputs are not those of the graph's record.

        Raises:
            BundleError: A tensor is missing, or has another dtype or shape.
        """
        record = self.manifest.graphs[name]
        for direction, wanted, found in (
            ("inputs", record.inputs, engine.inputs),
            ("outputs", record.outputs, engine.outputs),
        ):
            if {n: (s.dtype, _ranks(s)) for n, s in wanted.items()} != {
                n: (s.dtype, _ranks(s)) for n, s in found.items()
            }:
                raise BundleError(
                    f"{record.file}: the {direction} are {_describe(found)}, but the manifest "
                    f"says {_describe(wanted)}. " + self.make_again
                )


def open_bundle(
    folder: Path,
    *,
    verify_hashes: bool = True,
    verify_engine_graphs: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """Read a bundle and check that it is whole.

    Args:
        folder: The bundle.
        verify_hashes: Read every file and compare its SHA-256. False compares sizes alone, for a
            restart on a robot whose disk is slow.
        verify_engine_graphs: False compares sizes alone of the graphs that an engine runs, for one
            that was built from them before and does not read them.
        progress: Told what is being done, many times a second. What it raises ends the work.

    Raises:
        BundleError: The folder is no bundle, is of another schema, or a file is missing, has
            changed or contradicts another.
        ProcessorError: The processor files inside it are wrong.
    """
    manifest = _read_manifest(folder)
    unread: set[str] = set()
    if not verify_engine_graphs:
        unread.update(*map(manifest.files_of, manifest.engine_graphs))
    total = sum(size for name, (_, size) in manifest.files.items() if name not in unread)
    done = 0

    def tell(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        progress(f"verifying the bundle, {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    for name, (sha256, size) in manifest.files.items():
        is_read = verify_hashes and name not in unread
        again = _make_again(folder, is_quantized=manifest.is_quantized)
        _check_file(folder, name, sha256, size, again, tell if is_read else None)
    processor = load_processor(folder, manifest.embodiment)
    bundle = Bundle(folder=folder, manifest=manifest, processor=processor)
    _check_robot(bundle)
    _check_deployed(bundle)
    return bundle


class _FieldError(ValueError):
    """A field of the manifest is missing or not what it has to be."""


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise BundleError(f"{what}: {folder}. Give the folder that groot-int8 export wrote.")
    if not path.is_file():
        # Not with --force: the export replaces nothing but bundles.
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST_FILE}. Give the folder that "
            "groot-int8 export wrote; to make one, export to a new folder."
        )
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be read: {error}. " + _EXPORT_AGAIN.format(folder=folder)
        ) from error
    schema = content.get("schema_version") if isinstance(content, dict) else None
    if schema != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {schema!r}, and groot_int8_ros {__version__} reads "
            f"{SCHEMA_VERSION}. " + _make_again(folder, is_quantized=_says_quantized(content))
        )
    try:
        return _parse_manifest(content, str(path))
    except (_FieldError, ConfigurationError) as error:
        raise BundleError(
            f"{path} is damaged: {error}. "
            + _make_again(folder, is_quantized=_says_quantized(content))
        ) from error


def _make_again(folder: Path, *, is_quantized: bool) -> str:
    return _QUANTIZE_AGAIN if is_quantized else _EXPORT_AGAIN.format(folder=folder)


def _says_quantized(content: object) -> bool:
    """Whether a manifest that cannot be parsed records a quantisation all the same."""
    graphs = content.get("graphs") if isinstance(content, dict) else None
    records = graphs.values() if isinstance(graphs, dict) else ()
    return any(isinstance(record, dict) and "quantization" in record for record in records)


def _parse_manifest(content: Mapping[str, Any], source: str) -> Manifest:
    files = {}
    for name, value in _object(content, "files").items():
        _refuse_outside(name)
        record = _as_object(value, f"files.{name}")
        where = f"files.{name}."
        files[name] = (_text(record, "sha256", where), _count(record, "bytes", where))
    graphs = {
        name: _graph_from_dict(_as_object(record, f"graphs.{name}"), f"graphs.{name}.")
        for name, record in _object(content, "graphs").items()
    }
    family = _text(content, "family")
    if family not in FAMILIES:
        raise _not_expected("family", f"one of {', '.join(FAMILIES)}", family)
    missing = [name for name in engine_graphs(family) if name not in graphs]
    if missing:
        raise _FieldError(f"it lists no graph {missing[0]!r}")
    for name, graph in graphs.items():
        if graph.file not in files:
            raise _FieldError(f"the graph {name!r} lies in {graph.file}, which is not listed")
    for name in (TOKENIZER_FILE, *PROCESSOR_FILES[:2]):
        if name not in files:
            raise _FieldError(f"it does not list {name}")
    prompts = _prompts_from_dict(content, files, family, has_model=PREFIX_GRAPH in graphs)
    notes = _field(content, "notes")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise _not_expected("notes", "a list of texts", notes)
    return Manifest(
        exporter_version=_text(content, "exporter_version"),
        checkpoint_sha256=_text(content, "checkpoint_sha256"),
        family=family,
        embodiment=_text(content, "embodiment"),
        robot=parse_robot(_field(content, "robot"), f"{source}: robot"),
        action_horizon=_count(content, "action_horizon"),
        denoising_steps=_count(content, "denoising_steps"),
        timestep_buckets=_count(content, "timestep_buckets"),
        graphs=graphs,
        files=files,
        prompts=prompts,
        notes=tuple(notes),
    )


def _prompts_from_dict(
    content: Mapping[str, Any], files: Mapping[str, object], family: str, *, has_model: bool
) -> PromptRecords | None:
    if ("prompts" in content) != (family == DEPLOYED):
        raise _FieldError("prompts: deployed graphs, and no others, have a bank of instructions")
    if family != DEPLOYED:
        return None
    try:
        prompts = parse_prompts(_object(content, "prompts"))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
        raise _FieldError(f"prompts: {reason}") from error
    for record in prompts.instructions:
        if record.file not in files:
            raise _FieldError(
                f"the prefix of {record.text!r:.80} lies in {record.file}, which is not listed"
            )
    if not prompts.instructions and not has_model:
        raise _FieldError("prompts: there is neither an instruction nor a prefix model")
    return prompts


def _refuse_outside(name: str) -> None:
    # The manifest comes from disk like everything else: it must not lead out of the bundle.
    if leads_outside(name):
        raise _FieldError(f"the file name {name!r} leads out of the bundle")


def _not_expected(where: str, expected: str, value: object) -> _FieldError:
    try:
        found = json.dumps(value)
    except ValueError:  # an integer with more digits than Python prints
        found = "a number of thousands of digits"
    return _FieldError(f"{where} must be {expected}, not {found:.80}")


def _field(record: Mapping[str, Any], name: str, where: str = "") -> Any:
    if name not in record:
        raise _FieldError(f"it has no field {where}{name}")
    return record[name]


def _as_object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _not_expected(where, "a JSON object", value)
    return value


def _object(record: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any]:
    return _as_object(_field(record, name, where), where + name)


def _text(record: Mapping[str, Any], name: str, where: str = "") -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise _not_expected(where + name, "a text", value)
    return value


def _count(record: Mapping[str, Any], name: str, where: str = "") -> int:
    value = _field(record, name, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _not_expected(where + name, "a whole number of at least 1", value)
    return value


def _graph_to_dict(graph: GraphRecord) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "file": graph.file,
        "precision": graph.precision,
        "inputs": {n: {"dtype": s.dtype, "shape": list(s.shape)} for n, s in graph.inputs.items()},
        "outputs": {
            n: {"dtype": s.dtype, "shape": list(s.shape)} for n, s in graph.outputs.items()
        },
    }
    if graph.quantization is not None:
        entries["quantization"] = graph.quantization.to_dict()
    return entries


def _graph_from_dict(record: Mapping[str, Any], where: str) -> GraphRecord:
    def specs(direction: str) -> dict[str, TensorSpec]:
        tensors = _object(record, direction, where)
        inside = f"{where}{direction}."
        return {n: _spec_from_dict(_object(tensors, n, inside), f"{inside}{n}.") for n in tensors}

    precision = _text(record, "precision", where)
    if precision not in PRECISIONS:
        raise _not_expected(f"{where}precision", f"one of {', '.join(PRECISIONS)}", precision)
    if ("quantization" in record) != (precision == "int8"):
        raise _FieldError(
            f"{where}quantization: an int8 graph, and no other, has a quantisation record"
        )
    return GraphRecord(
        file=_text(record, "file", where),
        precision=precision,
        inputs=specs("inputs"),
        outputs=specs("outputs"),
        quantization=_quantization_from_dict(record, where) if precision == "int8" else None,
    )


def _quantization_from_dict(record: Mapping[str, Any], where: str) -> QuantizationRecord:
    try:
        return parse_record(_object(record, "quantization", where))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
        raise _FieldError(f"{where}quantization: {reason}") from error


def _spec_from_dict(record: Mapping[str, Any], where: str) -> TensorSpec:
    shape = _field(record, "shape", where)
    if not isinstance(shape, list) or not all(isinstance(axis, (int, str)) for axis in shape):
        raise _not_expected(f"{where}shape", "a list of lengths and axis names", shape)
    return TensorSpec(dtype=_text(record, "dtype", where), shape=tuple(shape))


def _ranks(spec: TensorSpec) -> tuple[int | None, ...]:
    # Engines name varying axes as they like; only fixed lengths are a contract.
    return tuple(axis if isinstance(axis, int) else None for axis in spec.shape)


def _describe(specs: Mapping[str, TensorSpec]) -> str:
    return "{" + ", ".join(f"{name}: {spec.describe()}" for name, spec in specs.items()) + "}"


def _check_file(
    folder: Path,
    name: str,
    sha256: str,
    size: int,
    again: str,
    progress: Callable[[int], None] | None,
) -> None:
    # Without `progress` the size alone is compared.
    path = folder / name
    try:
        if not path.is_file():
            raise BundleError(f"the bundle lacks {path}. {again}")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"{path} is a link that leads out of the bundle. Copy the bundle with what its "
                "links point at: cp --recursive --dereference"
            )
        found = path.stat().st_size
        changed = (
            progress is not None and found == size and sha256_of_file(path, progress) != sha256
        )
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. {again}") from error
    if found != size:
        raise BundleError(f"{path} has {found} bytes instead of {size}. {again}")
    if changed:
        raise BundleError(f"{path} is not the file that was exported (SHA-256 differs). {again}")


def _check_robot(bundle: Bundle) -> None:
    robot, processor = bundle.manifest.robot, bundle.processor
    found = (
        tuple(camera.key for camera in robot.cameras),
        {key: len(joints) for key, joints in robot.state_joints.items()},
        {key: len(joints) for key, joints in robot.action_joints.items()},
    )
    wanted = (
        tuple(processor.cameras),
        {key.key: key.dim for key in processor.state_keys},
        {key.key: key.dim for key in processor.action_keys},
    )
    if found != wanted:
        raise BundleError(
            f"{bundle.folder / MANIFEST_FILE}: cameras and joints {found} do not fit the "
            f"processor files' {wanted}. " + bundle.make_again
        )


def _check_deployed(bundle: Bundle) -> None:
    manifest, processor = bundle.manifest, bundle.processor
    if manifest.prompts is None:
        return
    fault = deployed_fault(
        manifest.graphs,
        manifest.robot.cameras,
        prefix_length=manifest.prompts.length,
        action_shape=(manifest.action_horizon, processor.max_action_dim),
        state_dim=processor.max_state_dim,
    )
    if fault:
        raise BundleError(f"{bundle.folder / MANIFEST_FILE}: {fault}. " + bundle.make_again)
