"""Writing a bundle: everything under a temporary name, checked, then renamed into place.

Owns: the order of the export and what it refuses before it starts. Peak memory is one tensor
beside the traced graph, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from groot_int8_ros import __version__
from groot_int8_ros.errors import (
    CheckpointError,
    ConfigurationError,
    ExportError,
    OutputError,
)
from groot_int8_ros.policy.bundle import (
    GRAPH_FOLDER,
    MANIFEST_FILE,
    PROCESSOR_FILES,
    TOKENIZER_FILE,
    GraphRecord,
    Manifest,
)
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.families import DEPLOYED, GRAPH_FILES
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied, sha256_of_file
from groot_int8_ros.policy.preprocess import Preprocessor, PromptTokenizer
from groot_int8_ros.policy.processor import Processor, load_processor
from groot_int8_ros.policy.prompt_bank import PromptRecords
from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.export.deployed_family import deployed_graphs
from offline_tools.export.graph import save, trace, weight_bytes
from offline_tools.export.graphs import ReferenceGraph, reference_graphs
from offline_tools.export.prompts import (
    Instructions,
    checkpoint_prefixes,
    dataset_instructions,
    given_instructions,
    plan_layout,
    write_prompts,
)
from offline_tools.export.robot_description import describe_robot
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import (
    CONFIG_FILE,
    ModelConfig,
    find_eagle_config,
    load_model_config,
    require_checkpoint,
)

# Beside the weights: the graphs themselves, tokenizer and processor files.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks the export for.

    Attributes:
        checkpoint: Folder of the fine-tuned checkpoint.
        bundle: Folder to write.
        tokenizer: Folder with `tokenizer.json`; the checkpoint's own if None.
        eagle_config: Sizes of vision tower and language model; see `load_model_config`.
        embodiment: Tag; the checkpoint's only one if None.
        robot: Robot description in YAML, or None.
        dataset: LeRobot dataset to take camera sizes, joint names and rate from, or None.
        graphs: Family of the graphs, one of `families.FAMILIES`.
        instructions: Instructions of a deployed bundle; the dataset's tasks if empty.
        max_prefix_tokens: Room for an instruction's prefix; that of the longest if None.
        prefix_model: Whether a deployed bundle can compute the prefix of a new instruction.
        precision: `fp16` or `fp32` for the large graphs.
        denoising_steps: Euler steps; the checkpoint's own number if None.
        force: Replace an existing bundle.
    """

    checkpoint: Path
    bundle: Path
    tokenizer: Path | None = None
    eagle_config: Path | None = None
    embodiment: str | None = None
    robot: Path | None = None
    dataset: Path | None = None
    graphs: str = DEPLOYED
    instructions: tuple[str, ...] = ()
    max_prefix_tokens: int | None = None
    prefix_model: bool = False
    precision: str = "fp16"
    denoising_steps: int | None = None
    force: bool = False


def write_bundle(options: ExportOptions, report: Callable[[str], None]) -> Manifest:
    """Export a checkpoint into a bundle.

    Args:
        options: What to export.
        report: Called with a line of progress at a time.

    Returns:
        The manifest that was written.

    Raises:
        GrootError: The checkpoint, the options or the disk do not allow it; the bundle folder is
            then as it was before.
    """
    refuse_occupied(options.bundle, marker=MANIFEST_FILE, what="a bundle", replace=options.force)
    require_checkpoint(options.checkpoint)
    processor = load_processor(options.checkpoint, options.embodiment)
    config, notes = load_model_config(options.checkpoint, options.eagle_config)
    _refuse_contradiction(processor, config)
    tokenizer_file = _find_tokenizer(options)
    tokenizer = PromptTokenizer.from_file(tokenizer_file)
    if tokenizer.image_token_id != config.language.image_token_id:
        raise CheckpointError(
            f"{tokenizer_file} gives image tokens the id {tokenizer.image_token_id}, the model "
            f"expects {config.language.image_token_id}: pass the tokenizer of the training code "
            "with --tokenizer"
        )
    robot = describe_robot(processor, options.robot, options.dataset)
    preprocessor = Preprocessor(processor, tokenizer, robot.cameras)
    prompts = _plan_prompts(options, preprocessor, report)
    steps = options.denoising_steps or config.denoising_steps
    if steps != config.denoising_steps:
        notes = (
            *notes,
            f"exported for {steps} denoising steps; the checkpoint's own number is "
            f"{config.denoising_steps}",
        )

    reader = CheckpointReader(options.checkpoint)
    reader.validate(config, find_eagle_config(options.checkpoint, options.eagle_config))
    notes = (*notes, *reader.notes)
    for note in notes:
        report(f"note: {note}")
    if prompts is None:
        graphs = reference_graphs(
            config,
            reader.tensor,
            embodiment_id=processor.embodiment_id,
            image_shape=preprocessor.image_shape,
            precision=options.precision,
        )
    else:
        graphs = deployed_graphs(
            config,
            reader.tensor,
            cameras=preprocessor.cameras,
            image_chain=processor.image_chain,
            embodiment_id=processor.embodiment_id,
            layout=prompts.layout,
            denoising_steps=steps,
            precision=options.precision,
            with_prefix_model=options.prefix_model,
        )
    files = GRAPH_FILES[options.graphs]
    _refuse_full_disk(options.bundle, graphs)
    with atomic_directory(options.bundle) as folder:
        records = {
            name: _write_graph(name, graph, folder / GRAPH_FOLDER / files[name], report)
            for name, graph in graphs.items()
        }
        _copy_inputs(options.checkpoint, tokenizer_file, folder)
        report("hashing")
        checkpoint_sha256 = checkpoint_hash(options.checkpoint, reader)
        bank = None
        if prompts is not None:
            report(f"prefixes of {len(prompts.instructions.texts)} instructions")
            room = prompts.layout.prefix_length
            prefixes = checkpoint_prefixes(
                config, reader.tensor, prompts.instructions.prefix_ids, room, checkpoint_sha256
            )
            bank = PromptRecords(room, write_prompts(prompts.instructions, prefixes, folder))
            _report_memory("prefixes", report)
        manifest = Manifest(
            exporter_version=__version__,
            checkpoint_sha256=checkpoint_sha256,
            family=options.graphs,
            embodiment=processor.embodiment_tag,
            robot=robot,
            action_horizon=config.action_horizon,
            denoising_steps=steps,
            timestep_buckets=config.timestep_buckets,
            graphs=records,
            files={
                path.relative_to(folder).as_posix(): (
                    sha256_of_file(path),
                    path.stat().st_size,
                )
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
            prompts=bank,
            notes=notes,
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class _Prompts:
    """Instructions of a deployed bundle, and where tokens stand in its graphs."""

    instructions: Instructions
    layout: TokenLayout


def _plan_prompts(
    options: ExportOptions, preprocessor: Preprocessor, report: Callable[[str], None]
) -> _Prompts | None:
    """Return a deployed bundle's prompts, None for reference graphs."""
    if options.graphs != DEPLOYED:
        for option, given in (
            ("--instruction", options.instructions),
            ("--max-prefix-tokens", options.max_prefix_tokens),
            ("--prefix-model", options.prefix_model),
        ):
            if given:
                raise ConfigurationError(
                    f"{option} goes with --graphs {DEPLOYED}: reference graphs take any "
                    "instruction as token ids"
                )
        return None
    if options.instructions or options.dataset is None:
        instructions = given_instructions(options.instructions, preprocessor)
    else:
        instructions = dataset_instructions(options.dataset, preprocessor, report)
    layout = plan_layout(
        instructions,
        preprocessor,
        max_prefix_tokens=options.max_prefix_tokens,
        prefix_model=options.prefix_model,
    )
    return _Prompts(instructions, layout)


def _refuse_contradiction(processor: Processor, config: ModelConfig) -> None:
    for what, in_processor, in_config in (
        ("max_state_dim", processor.max_state_dim, config.max_state_dim),
        ("max_action_dim", processor.max_action_dim, config.max_action_dim),
    ):
        if in_processor != in_config:
            raise CheckpointError(
                f"{what} is {in_processor} in processor_config.json and {in_config} in "
                f"{CONFIG_FILE}: the files do not belong to the same checkpoint"
            )
    if processor.embodiment_id >= config.max_embodiments:
        raise CheckpointError(
            f"embodiment {processor.embodiment_tag!r} has the row {processor.embodiment_id}, but "
            f"the checkpoint has {config.max_embodiments} embodiments"
        )
    if max(processor.delta_indices) >= config.action_horizon:
        raise CheckpointError(
            f"the processor decodes action step {max(processor.delta_indices)}, but the model "
            f"predicts {config.action_horizon} steps"
        )


def _find_tokenizer(options: ExportOptions) -> Path:
    folder = options.tokenizer or options.checkpoint
    path = folder if folder.is_file() else folder / TOKENIZER_FILE
    if not path.is_file():
        raise ConfigurationError(
            f"{path} does not exist. Released checkpoints do not carry the tokenizer: pass "
            "--tokenizer with the folder of the Eagle-Block2A-2B-v2 processor from the training "
            "code"
        )
    return path


def _refuse_full_disk(bundle: Path, graphs: Mapping[str, ReferenceGraph]) -> None:
    needed = sum(weight_bytes(graph.spec) for graph in graphs.values()) + _SPARE_BYTES
    existing = bundle.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the bundle takes about {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB "
            "free; nothing was written. Free space or name a folder on another disk."
        )


def _write_graph(
    name: str,
    graph: ReferenceGraph,
    path: Path,
    report: Callable[[str], None],
) -> GraphRecord:
    report(f"{name}: tracing")
    model = trace(graph.spec, graph.weights)
    path.parent.mkdir(exist_ok=True)
    report(f"{name}: writing weights")
    save(model, path)
    report(f"{name}: checking with the ONNX checker and ONNX Runtime")
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX checker refuses {name}: {error}") from error
    engine = OnnxRuntimeEngine(path, keep_graph_as_written=True)
    record = GraphRecord(
        file=f"{GRAPH_FOLDER}/{path.name}",
        precision=graph.precision,
        inputs=dict(engine.inputs),
        outputs=dict(engine.outputs),
    )
    engine.close()
    _report_memory(name, report)
    return record


def _report_memory(what: str, report: Callable[[str], None]) -> None:
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report(f"{what}: done; the process's peak memory so far is {peak_bytes / 1e9:.2f} GB")


def _copy_inputs(checkpoint: Path, tokenizer_file: Path, folder: Path) -> None:
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    for name in PROCESSOR_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def checkpoint_hash(checkpoint: Path, reader: CheckpointReader) -> str:
    """Return the SHA-256 over a checkpoint's configuration, processor and weight files.

    The processor's statistics belong to it: with others, the same weights are another policy.
    """
    digest = hashlib.sha256()
    processor = [path for name in PROCESSOR_FILES if (path := checkpoint / name).is_file()]
    for path in (checkpoint / CONFIG_FILE, *processor, *reader.files):
        digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()
