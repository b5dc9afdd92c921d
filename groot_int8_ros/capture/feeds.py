"""What captured samples are to a graph: its inputs, again and again.

Owns: `Feeds`, and how a sample becomes the inputs of each family's large graphs. Must not import
ROS, torch or an engine.

The reference graphs' inputs are stored as they were. Of the deployed graphs a sample holds what
changes: frames, noise and features, and committed rows where there were any; the instruction's
prefix comes from the bundle's bank, and state and committed rows are normalised again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.errors import CaptureError, ObservationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.types import Observation

Feed = Mapping[str, NDArray[Any]]
ToFeeds = Callable[[CaptureSample], Iterator[Feed]]


class Feeds:
    """The inputs of one graph, over all samples; every iteration starts from the beginning."""

    def __init__(
        self,
        samples: Callable[[], Iterator[CaptureSample]],
        count: int,
        to_feeds: ToFeeds,
        per_sample: int = 1,
    ) -> None:
        """Take samples.

        Args:
            samples: Reads them from the first one on at every call.
            count: How many there are.
            to_feeds: A sample's feeds.
            per_sample: How many those are.
        """
        self._samples = samples
        self._count = count
        self._to_feeds = to_feeds
        self._per_sample = per_sample

    def __len__(self) -> int:
        """Number of feeds: one a sample, for `dit` one a sample and denoising step."""
        return self._count * self._per_sample

    def __iter__(self) -> Iterator[Feed]:
        """Yield input name to array with a batch axis of 1, where the graph has one."""
        for sample in self._samples():
            yield from self._to_feeds(sample)


def backbone_feeds(sample: CaptureSample) -> Iterator[Feed]:
    """Yield the inputs of the reference family's `backbone`."""
    one = sample.backbone
    assert one is not None
    yield {
        "input_ids": one.input_ids[None],
        "attention_mask": one.attention_mask[None],
        # The cameras are the first axis; the graph has no other batch axis for them.
        "pixel_values": one.pixel_values,
    }


def dit_feeds(sample: CaptureSample) -> Iterator[Feed]:
    """Yield the inputs of the reference family's `dit`, one feed a denoising step."""
    dit = sample.dit
    assert dit is not None
    for step in range(len(dit.timestep)):
        yield {
            "sa_embs": dit.sa_embs[step : step + 1],
            "vl_embs": dit.vl_embs[None],
            "timestep": dit.timestep[step : step + 1],
            "image_mask": dit.image_mask[None],
            "backbone_attention_mask": dit.backbone_attention_mask[None],
        }


def deployed_feeds(bundle: Bundle, graph: str) -> ToFeeds:
    """Return what turns a sample into the inputs of one of a bundle's deployed graphs.

    Args:
        bundle: With deployed graphs; its bank has the instructions' prefixes.
        graph: `backbone` or `action_head`.
    """
    # Here, because it brings OpenCV and the tokenizer.
    from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
    from groot_int8_ros.policy.graph_runs import CommittedRows

    graphs = DeployedGraphs(bundle, {})

    def feeds(sample: CaptureSample) -> Iterator[Feed]:
        try:
            inputs = graphs.preprocess(observation_of(sample))
            rows = None
            if sample.committed is not None and graph != "backbone":
                rows = CommittedRows.encoded(
                    bundle.processor,
                    bundle.manifest.action_horizon,
                    sample.committed,
                    sample.state,
                )
        except ObservationError as error:
            raise CaptureError(f"{sample.source}: {error}") from error
        if graph == "backbone":
            yield graphs.backbone_feeds(inputs)
            return
        assert sample.features is not None
        assert sample.noise is not None
        yield graphs.head_feeds(inputs, sample.features[None], sample.noise, rows)

    return feeds


def observation_of(sample: CaptureSample) -> Observation:
    """Return the observation that a sample was made from.

    Raises:
        CaptureError: The sample does not hold its frames or its instruction.
    """
    if sample.images is None or not sample.instruction:
        raise CaptureError(
            f"{sample.source}: the sample has no images or no instruction, so nothing can be "
            "computed from it. Record it with calibration_recorder_node."
        )
    return Observation(sample.images, sample.state, sample.instruction, sample.stamp_ns)
