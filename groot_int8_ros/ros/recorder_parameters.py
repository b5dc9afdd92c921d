"""Parameters of the calibration recorder.

Owns: what the recorder has beyond the policy node's parameters. Must not import an engine. The
policy node's own come first, with the same names and meanings, so that one YAML serves both.
`config/calibration_recorder.yaml` documents them for users; a test keeps the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rclpy.node import Node

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.ros.parameters import (
    PARAMETERS,
    Declaration,
    NodeParameters,
    ParameterSet,
)

RECORDER_PARAMETERS: Mapping[str, Declaration] = {
    **PARAMETERS,
    "output": Declaration("", "New folder of the capture store. Required."),
    "samples": Declaration(
        256,
        "Samples to keep at most, chosen over the whole run.",
        low=1,
        high=100_000,
    ),
    "samples_per_shard": Declaration(
        16, "Samples held in memory, and lost at most when the process is killed.", low=1, high=512
    ),
    "with_chunks": Declaration(
        True,
        "Record what a running policy node answered. False records observations without one.",
    ),
    "run_policy": Declaration(
        False,
        "Run the bundle's policy in this node, and record its answers and what its graphs were "
        "given. Takes the policy's memory; not beside with_chunks.",
    ),
    "policy_node": Declaration(
        "policy_node", "Name of the policy node; `~` in chunk_topic stands for it.", is_topic=True
    ),
    "history_mib": Declaration(
        256,
        "Memory for camera frames that wait for their chunk, in MiB.",
        low=1,
        high=65536,
    ),
}


@dataclass(frozen=True)
class RecorderParameters(NodeParameters):
    """The policy node's parameters and the recorder's; `RECORDER_PARAMETERS` describes each.

    Attributes:
        output: Folder of the store.
        samples: Samples to keep at most.
        samples_per_shard: See `CaptureWriter`.
        with_chunks: Whether a policy node's chunks are recorded.
        run_policy: Whether the recorder runs the policy itself.
        policy_node: Name of the policy node.
        history_mib: Memory for frames that wait for their chunk, MiB.
    """

    output: str
    samples: int
    samples_per_shard: int
    with_chunks: bool
    run_policy: bool
    policy_node: str
    history_mib: int

    @property
    def output_path(self) -> Path:
        """Folder of the store.

        Raises:
            ConfigurationError: The parameter is empty.
        """
        if not self.output:
            raise ConfigurationError(
                "parameter 'output' is empty; set it to a new folder for the samples"
            )
        return Path(self.output).expanduser()

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ConfigurationError: Chunks of a policy node are wanted, and a policy here.
        """
        if self.with_chunks and self.run_policy:
            raise ConfigurationError(
                "parameters 'with_chunks' and 'run_policy' are both true, and a sample has one "
                "answer: set 'with_chunks' to false to run the policy in the recorder, or "
                "'run_policy' to false to record the policy node's answers"
            )

    def policy_topic(self, topic: str) -> str:
        """Return a topic of the policy node, whose private names begin with `~`."""
        return topic.replace("~", self.policy_node, 1) if topic.startswith("~") else topic


class RecorderParameterSet(ParameterSet[RecorderParameters]):
    """The recorder's; see `ParameterSet`."""

    def __init__(
        self,
        node: Node,
        is_configured: Callable[[], bool],
        changed: Callable[[Collection[str]], None],
    ) -> None:
        """Declare `RECORDER_PARAMETERS`; see `ParameterSet` for the arguments."""
        super().__init__(node, is_configured, changed, RECORDER_PARAMETERS, RecorderParameters)
