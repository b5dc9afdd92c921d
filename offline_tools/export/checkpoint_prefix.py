"""The prefix of an instruction from the checkpoint that a bundle was exported from.

Owns: nothing but the wiring of checkpoint and prefix model; it is apart from the subcommand
because it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.prompt_bank import PromptPrefix
from offline_tools.export.prompts import checkpoint_prefixes
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import load_model_config
from offline_tools.verify.checks import refuse_other_checkpoint


def prefix_from_checkpoint(
    bundle: Bundle, checkpoint: Path, eagle_config: Path | None
) -> Callable[[str], PromptPrefix]:
    """Return what computes prefixes for a bundle with a checkpoint's weights, in float32.

    Raises:
        CheckpointError: The bundle was exported from another checkpoint.
    """
    config, _ = load_model_config(checkpoint, eagle_config)
    reader = CheckpointReader(checkpoint)
    refuse_other_checkpoint(bundle, checkpoint, reader)
    prompts = bundle.manifest.prompts
    assert prompts is not None
    room, sha256 = prompts.length, bundle.manifest.checkpoint_sha256
    graphs = DeployedGraphs(bundle, {})

    def compute(text: str) -> PromptPrefix:
        ids = [graphs.prefix_ids(text)]
        return checkpoint_prefixes(config, reader.tensor, ids, room, sha256)[0]

    return compute
