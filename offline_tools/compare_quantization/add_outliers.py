"""`groot-int8 add-outliers`: a copy of a checkpoint that is as hard to quantise as a real one.

Owns: the subcommand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.processor import load_processor
from offline_tools.arguments import seed
from offline_tools.compare_quantization.outliers import write_edited
from offline_tools.compare_quantization.variants import (
    PLAIN,
    VARIANTS,
    plan_variant,
    prompt_tokens,
)
from offline_tools.model.configuration import find_eagle_config, load_model_config


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="left as it is")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--variant",
        choices=[name for name in VARIANTS if name != PLAIN],
        required=True,
        help="; ".join(f"{name}: {text}" for name, text in VARIANTS.items() if name != PLAIN),
    )
    parser.add_argument("--tokenizer", type=Path, help="as for export")
    parser.add_argument("--eagle-config", type=Path, help="as for export")
    parser.add_argument("--embodiment", help="as for export")
    parser.add_argument("--seed", type=seed, default=0, help="which channels (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    refuse_occupied(args.output)
    eagle = find_eagle_config(args.checkpoint, args.eagle_config)
    config, _ = load_model_config(args.checkpoint, eagle)
    processor = load_processor(args.checkpoint, args.embodiment)
    tokens = prompt_tokens(processor, args.tokenizer or args.checkpoint)
    edits = plan_variant(args.variant, config, tokens, args.seed)
    write_edited(args.checkpoint, args.output, edits)
    print(f"{args.output}: {len(edits)} tensors edited, {VARIANTS[args.variant]}")
    return 0
