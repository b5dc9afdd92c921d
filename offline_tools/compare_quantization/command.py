"""`groot-int8 compare-quantization`: every scheme on the same models and data, in one table.

Owns: the subcommand, its options and its report.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from groot_int8_ros import __version__
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.families import DEPLOYED, FAMILIES
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied
from groot_int8_ros.policy.processor import load_processor
from groot_int8_ros.policy.types import Observation
from offline_tools.arguments import positive_int, seed
from offline_tools.compare_quantization import table
from offline_tools.compare_quantization.baselines import missing_modelopt_modules
from offline_tools.compare_quantization.comparison import (
    BFLOAT16,
    FLOAT16,
    Model,
    Refusal,
    Row,
    bundle_actions,
    compare_schemes,
    float_row,
    prepare_model,
)
from offline_tools.compare_quantization.samples import (
    GENERATED_INSTRUCTION,
    capture_samples,
    generated_observations,
    recorded_observations,
)
from offline_tools.compare_quantization.schemes import MODELOPT_SCHEMES, SCHEMES
from offline_tools.compare_quantization.variants import (
    PLAIN,
    VARIANTS,
    plan_variant,
    prompt_tokens,
)
from offline_tools.quantize.evaluation import compare_actions
from offline_tools.quantize.int8_bundle import DEFAULT_BUDGET


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="checkpoint to compare on, with variants")
    what.add_argument("--bundle", type=Path, help="float bundle to compare on, as it is")
    parser.add_argument("--output", type=Path, required=True, help="folder for table and picture")
    parser.add_argument("--tokenizer", type=Path, help="as for export")
    parser.add_argument("--eagle-config", type=Path, help="as for export")
    parser.add_argument("--embodiment", help="as for export")
    parser.add_argument("--robot", type=Path, help="as for export")
    parser.add_argument(
        "--dataset",
        type=Path,
        help="LeRobot dataset: robot as for export, and the observations (default: generated)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        help="default: all. "
        + "; ".join(f"{name}: {meaning}" for name, meaning in VARIANTS.items()),
    )
    parser.add_argument(
        "--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help="default: all"
    )
    parser.add_argument(
        "--graphs",
        nargs="+",
        choices=FAMILIES,
        default=[DEPLOYED],
        help="of --checkpoint: which graphs to quantise; both for a table of the two (default: "
        f"{DEPLOYED})",
    )
    parser.add_argument("--denoising-steps", type=int, choices=(1, 2, 4), help="as for export")
    parser.add_argument(
        "--calibration-samples",
        type=positive_int,
        default=16,
        help="observations (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluation-samples", type=positive_int, default=8, help="others (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="of ONNX Runtime (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print the table and write it with a picture."""
    _check(args)
    refuse_occupied(args.output)
    schemes = _runnable(args.schemes)
    rows: list[Row] = []
    refusals: list[Refusal] = []
    with atomic_directory(args.output) as folder:
        with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
            for model, source in _models(args, Path(work)):
                if not rows:
                    print(table.header(list(model.errors(model.evaluation.action_pred).by_unit)))
                for result in _compare(args, model, source, schemes, Path(work) / "quantised"):
                    if isinstance(result, Row):
                        rows.append(result)
                    else:
                        refusals.append(result)
        said = table.verdicts(rows, refusals)
        report = {
            "version": __version__,
            "source": (args.checkpoint or args.bundle).name,
            "observations": args.dataset.name if args.dataset else "generated",
            "calibration_samples": args.calibration_samples,
            "evaluation_samples": args.evaluation_samples,
            "seed": args.seed,
            "graphs": args.graphs if args.checkpoint else None,
            "verdicts": said,
            "rows": [row.to_dict() for row in rows],
            "refusals": [asdict(refusal) for refusal in refusals],
        }
        text = json.dumps(report, indent=1, allow_nan=False)
        (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
        table.draw(folder / "comparison.png", rows)
    print("\n".join(["", *said]))
    return 0


@dataclass(frozen=True)
class _Source:
    """What a model was exported from, for the rows in other floating types."""

    checkpoint: Path
    fp16_bundle: Bundle


def _check(args: argparse.Namespace) -> None:
    if args.bundle and args.variants != list(VARIANTS) and args.variants != [PLAIN]:
        raise ConfigurationError(
            "--variants edit a checkpoint's weights: give --checkpoint instead of --bundle"
        )


def _runnable(schemes: list[str]) -> list[str]:
    missing = missing_modelopt_modules()
    if not missing:
        return schemes
    skipped = [name for name in schemes if name in MODELOPT_SCHEMES]
    if skipped:
        print(
            f"not run: {', '.join(skipped)}, because {', '.join(missing)} is not installed "
            "(pip install 'groot_int8_ros[compare]')"
        )
    return [name for name in schemes if name not in MODELOPT_SCHEMES]


def _models(args: argparse.Namespace, work: Path) -> Iterator[tuple[Model, _Source | None]]:
    """Prepare one model at a time; its files are gone when the next one is asked for."""
    if args.bundle:
        bundle = open_bundle(args.bundle)
        precisions = {
            bundle.manifest.graphs[name].precision for name in bundle.manifest.engine_graphs
        }
        if precisions != {"fp32"}:
            raise ConfigurationError(
                f"{args.bundle} is not in float32 and cannot be the reference: export one with "
                "--precision fp32"
            )
        yield _prepare(args, args.bundle.name, bundle), None
        return
    # A bundle without a checkpoint can be compared where torch is missing.
    from offline_tools.compare_quantization.outliers import write_edited
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle
    from offline_tools.model.configuration import find_eagle_config, load_model_config

    eagle = find_eagle_config(args.checkpoint, args.eagle_config)
    config, _ = load_model_config(args.checkpoint, eagle)
    options = ExportOptions(
        checkpoint=args.checkpoint,
        bundle=work / "bundle",
        tokenizer=args.tokenizer or args.checkpoint,
        eagle_config=eagle,
        embodiment=args.embodiment,
        robot=args.robot,
        dataset=args.dataset,
        precision="fp32",
        denoising_steps=args.denoising_steps,
        force=True,
    )
    processor = load_processor(args.checkpoint, args.embodiment)
    tokens = prompt_tokens(processor, args.tokenizer or args.checkpoint)
    for variant in args.variants:
        checkpoint = args.checkpoint
        if variant != PLAIN:
            checkpoint = work / "checkpoint"
            edits = plan_variant(variant, config, tokens, args.seed)
            write_edited(args.checkpoint, checkpoint, edits)
        for family in args.graphs:
            # Reference graphs take any instruction, and a dataset brings its own.
            spoken = family == DEPLOYED and not args.dataset
            chosen = replace(
                options,
                checkpoint=checkpoint,
                graphs=family,
                instructions=(GENERATED_INSTRUCTION,) if spoken else (),
            )
            write_bundle(chosen, _silent)
            half = replace(chosen, bundle=work / "fp16", precision="fp16")
            write_bundle(half, _silent)
            bundle = open_bundle(chosen.bundle)
            name = variant if len(args.graphs) == 1 else f"{variant}, {family}"
            yield _prepare(args, name, bundle), _Source(checkpoint, open_bundle(half.bundle))


def _silent(_line: str) -> None:
    """Export reports every graph; here that would drown the table."""


def _prepare(args: argparse.Namespace, name: str, bundle: Bundle) -> Model:
    counts = args.calibration_samples, args.evaluation_samples
    calibration: list[Observation]
    evaluation: list[Observation]
    if args.dataset:
        calibration, evaluation = recorded_observations(bundle, args.dataset, counts)
    else:
        # RandomState takes seeds of 32 bits.
        drawn_from = 2 * args.seed % 2**32
        calibration = generated_observations(bundle, counts[0], drawn_from)
        evaluation = generated_observations(bundle, counts[1], drawn_from + 1)
    return prepare_model(
        name, bundle, calibration, evaluation, seed=args.seed, threads=args.threads
    )


def _compare(
    args: argparse.Namespace, model: Model, source: _Source | None, schemes: list[str], work: Path
) -> list[Row | Refusal]:
    rows: list[Row] = []
    yardstick: float | None = None
    budget = DEFAULT_BUDGET
    if source is not None:
        from offline_tools.compare_quantization.bfloat16 import bfloat16_actions

        preprocess = model.bundle.preprocessor()
        calibrated, judged = (
            bfloat16_actions(
                source.checkpoint,
                args.eagle_config,
                [preprocess(observation) for observation in answers.observations],
                answers.noise,
                embodiment_id=model.bundle.processor.embodiment_id,
                denoising_steps=model.bundle.manifest.denoising_steps,
            )
            for answers in (model.calibration, model.evaluation)
        )
        # What `auto` aims at may not be known from the samples that judge it; and it is in the
        # search's own metric, which leaves out what the embodiment does not use.
        budget = compare_actions(
            model.bundle.processor,
            list(capture_samples(model.calibration, model.bundle.manifest.family, args.seed)),
            model.calibration.action_pred,
            calibrated,
        ).relative_l2
        rows.append(float_row(model, BFLOAT16, judged))
        yardstick = rows[0].errors.relative_l2
        half = bundle_actions(
            source.fp16_bundle,
            model.evaluation.observations,
            seed=args.seed,
            threads=args.threads,
        )
        rows.append(float_row(model, FLOAT16, half))
        for row in rows:
            print(table.line(row, yardstick), flush=True)

    def report(result: Row | Refusal) -> None:
        if isinstance(result, Row):
            print(table.line(result, yardstick), flush=True)
        else:
            print(f"| {result.model} | {result.scheme} | none: {result.reason} |", flush=True)

    return [
        *rows,
        *compare_schemes(model, schemes, work, report, budget=budget, threads=args.threads),
    ]
