"""`groot-int8 parity`: is this model the one that the reference computed?

Owns: the subcommand's options, which golden file is compared by what, and the exit code. Golden
vectors are tensors recorded at every boundary of the public GR00T N1.6 code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.preprocess import PromptTokenizer
from offline_tools.model.checkpoint import load_model
from offline_tools.model.configuration import EAGLE_CONFIG_FILE, find_eagle_config
from offline_tools.parity.boundaries import ObservationCheck
from offline_tools.parity.chain import Array, Chain, load_processors
from offline_tools.parity.recording import Recording, read_json
from offline_tools.parity.report import Report
from offline_tools.parity.sets import (
    check_batch,
    check_image_sizes,
    check_normalisation,
    check_preprocess,
    check_tokenizer,
)

_EXIT_FAILED = 1
_OBSERVATION = re.compile(r"golden_obs(\d+)")
# The reference's default of the vision tower's window, whose order some recordings keep.
_WINDOW_SIZE = 14
# golden_batch2.npz is recorded with this many denoising steps, whatever the checkpoint asks for.
_BATCH_STEPS = 4
# Recorded in lower precision: they show how much rounding costs and are nothing to agree with.
_YARDSTICKS = {"golden_bf16"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="folder of the checkpoint the golden vectors were recorded from",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder that holds tokenizer.json"
    )
    parser.add_argument(
        "--golden", type=Path, required=True, help="folder with golden_obs*.npz and its siblings"
    )
    parser.add_argument(
        "--eagle-config",
        type=Path,
        help="Eagle configuration that sizes vision tower and language model (default: "
        "eagle_config.json in the checkpoint, else in the golden folder, else the public sizes)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare every recorded boundary, print the table, return 1 if one is off."""
    golden: Path = args.golden
    eagle = find_eagle_config(args.checkpoint, args.eagle_config)
    if eagle is None and (golden / EAGLE_CONFIG_FILE).exists():
        eagle = golden / EAGLE_CONFIG_FILE
    report = Report()
    chain = _load_chain(args.checkpoint, args.tokenizer, eagle, report)
    check_golden_set(golden, chain, report)
    print(report.table())
    return _EXIT_FAILED if report.failures else 0


def _load_chain(
    checkpoint: Path, tokenizer_folder: Path, eagle: Path | None, report: Report
) -> Chain:
    model, config, notes = load_model(checkpoint, eagle)
    for note in notes:
        report.note(note)
    tokenizer = PromptTokenizer.from_file(tokenizer_folder / "tokenizer.json")
    if tokenizer.image_token_id != config.language.image_token_id:
        raise ConfigurationError(
            f"the tokenizer in {tokenizer_folder} gives image tokens the id "
            f"{tokenizer.image_token_id}, the model expects {config.language.image_token_id}: no "
            "image would reach the language model. Use the tokenizer of this checkpoint."
        )
    window = _window_size(eagle)
    processors, refused = load_processors(checkpoint)
    for reason in refused:
        report.note(f"not usable: {reason}")
    return Chain(model, processors, refused, tokenizer, window)


def _window_size(eagle: Path | None) -> int:
    described: Mapping[str, Any] = {} if eagle is None else read_json(eagle)
    return int(described.get("vision_config", {}).get("window_size", _WINDOW_SIZE))


def check_golden_set(golden: Path, chain: Chain, report: Report) -> None:
    """Compare all files of a golden set.

    Args:
        golden: Folder of the set.
        chain: The policy to judge.
        report: Gets results and notes.

    Raises:
        ConfigurationError: The folder is no golden set or belongs to another checkpoint.
    """
    files = {path.stem: path for path in sorted(golden.glob("golden_*.npz"))}
    numbers = {int(m[1]): name for name in files if (m := _OBSERVATION.fullmatch(name))}
    if not numbers:
        raise ConfigurationError(
            f"{golden} holds no golden_obs*.npz: there is nothing to compare with. Give the "
            "folder of a golden set."
        )
    observations: dict[int, ObservationCheck] = {}
    pixels: dict[int, Array] = {}
    for number, name in sorted(numbers.items()):
        recording = Recording(files.pop(name))
        observations[number] = ObservationCheck(chain, recording, report)
        observations[number].run()
        if "pixel_values" in recording:
            pixels[number] = recording["pixel_values"]
    processor = next(iter(observations.values())).processor

    checks: dict[str, Callable[[Recording], None]] = {
        "golden_preprocess": lambda recording: check_preprocess(
            recording, processor.image_chain, report
        ),
        "golden_tokenizer": lambda recording: check_tokenizer(
            recording,
            golden / "golden_tokenizer.json",
            chain,
            processor.formalize_language,
            report,
        ),
        "golden_norm": lambda recording: check_normalisation(
            recording, golden / "golden_norm.json", report
        ),
        "golden_batch2": lambda recording: check_batch(
            recording, chain, observations, pixels, _BATCH_STEPS, report
        ),
    }
    for name, check in checks.items():
        if name not in files:
            report.note(f"{name}.npz is not in the golden set")
            continue
        recording = Recording(files.pop(name))
        check(recording)
        if recording.unused:
            report.note(f"{name}: not compared: {', '.join(recording.unused)}")

    sizes = golden / "image_sizes.json"
    if sizes.exists():
        check_image_sizes(sizes, processor.image_chain, report)
    else:
        report.note("image_sizes.json is not in the golden set")
    for name in files:
        report.note(
            f"{name}.npz is a yardstick of lower precision, no target; it is not compared"
            if name in _YARDSTICKS
            else f"{name}.npz is of no known kind; it is not compared"
        )
