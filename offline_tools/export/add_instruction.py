"""`groot-int8 add-instruction`: put further instructions into a bundle's bank.

Owns: the subcommand. Needs torch only with `--checkpoint`: a robot with a prefix model in its
bundle does without. Graphs and engines stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import MANIFEST_FILE, Bundle, open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.files import atomic_file, sha256_of_file
from groot_int8_ros.policy.prefix_model import compute_prefix
from groot_int8_ros.policy.prompt_bank import PromptPrefix, PromptRecord, PromptRecords

Compute = Callable[[str], PromptPrefix]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of deployed graphs")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="compute with this checkpoint's weights (default: the bundle's own prefix model)",
    )
    parser.add_argument("--eagle-config", type=Path, help="as it was given to export")
    parser.add_argument("instructions", nargs="+", metavar="TEXT", help="what to add")


def run(args: argparse.Namespace) -> int:
    """Compute each new instruction's prefix and add it to the bundle."""
    bundle = open_bundle(args.bundle, verify_hashes=False)
    if bundle.manifest.prompts is None:
        raise ConfigurationError(
            f"{args.bundle} holds reference graphs, which take any instruction: there is nothing "
            "to add"
        )
    compute: Compute
    if args.checkpoint:
        from offline_tools.export.checkpoint_prefix import prefix_from_checkpoint

        compute = prefix_from_checkpoint(bundle, args.checkpoint, args.eagle_config)
    else:
        bundle = open_bundle(args.bundle)

        def compute(text: str) -> PromptPrefix:
            return compute_prefix(bundle, text)

    add_instructions(bundle, args.instructions, compute, print)
    return 0


def add_instructions(
    bundle: Bundle, texts: list[str], compute: Compute, report: Callable[[str], None]
) -> None:
    """Add instructions to a bundle on disk, one at a time.

    A prefix is written before the manifest that lists it: a killed run leaves the bundle whole,
    with or without the instruction.

    Args:
        bundle: A bundle of deployed graphs.
        texts: What to add; what is there already is left as it is.
        compute: Gives the prefix of an instruction.
        report: Called with a line for each.

    Raises:
        ObservationError: An instruction cannot be used, or is longer than the graphs' room.
        OutputError: The bundle cannot be written.
    """
    for text in texts:
        prompts = bundle.manifest.prompts
        assert prompts is not None
        graphs = DeployedGraphs(bundle, {})
        ids = graphs.prefix_ids(text)
        graphs.bank.check_length(ids)
        if graphs.bank.knows(ids):
            report(f"{text!r} is in the bundle already")
            continue
        prefix = compute(text)
        path = bundle.folder / prefix.file
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            prefix.write(stream)
        record = PromptRecord(text, prefix.file, prefix.input_ids.size)
        manifest = replace(
            bundle.manifest,
            prompts=PromptRecords(prompts.length, (*prompts.instructions, record)),
            files={
                **bundle.manifest.files,
                prefix.file: (sha256_of_file(path), path.stat().st_size),
            },
        )
        with atomic_file(bundle.folder / MANIFEST_FILE) as temporary:
            temporary.write_text(manifest.to_json(), encoding="utf-8")
        bundle = replace(bundle, manifest=manifest)
        report(f"{text!r}: {record.tokens} tokens, {path.stat().st_size / 1e6:.1f} MB, added")
