"""From an observation to an action chunk, whichever family of graphs the bundle has.

Owns: `Policy` and the noise of the flow; the graphs are run in `reference_graphs` and
`deployed_graphs`. Must not import ROS or torch: the node, a notebook, the
calibration and the evaluation all run this code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import ConfigurationError, ObservationError
from groot_int8_ros.policy.bundle import Bundle, Manifest, open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.engines import Engine, load_engine
from groot_int8_ros.policy.engines.engine_report import refuse_failed_engines
from groot_int8_ros.policy.families import DEPLOYED
from groot_int8_ros.policy.graph_runs import CommittedRows, GraphObserver
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.prompt_bank import PromptPrefix
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import (
    ActionChunk,
    CommittedActions,
    Float32Array,
    Float64Array,
    Observation,
)

DEFAULT_SEED = 0


def draw_noise(seed: int, stamp_ns: int, shape: tuple[int, ...]) -> Float32Array:
    """Draw the flow's initial noise for one observation.

    The stream depends on the seed and the observation's stamp alone, so a published chunk can be
    computed again from a bag. NumPy promises that `RandomState` never changes its streams, which
    it does not for `Generator`.

    Args:
        seed: 0 to 2**32 - 1.
        stamp_ns: The observation's stamp in nanoseconds.
        shape: Shape of the noise.

    Returns:
        Standard normal values, float32.

    Raises:
        ObservationError: The seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ObservationError(f"the seed must be from 0 to 2**32 - 1, not {seed}")
    stamp = stamp_ns % 2**64
    state = np.random.RandomState([seed, stamp & 0xFFFFFFFF, stamp >> 32])
    return state.standard_normal(shape).astype(np.float32)


class Policy:
    """A loaded policy: graphs, observation chain and action chain of one bundle.

    Lifecycle: `Policy.load` verifies the bundle and loads every engine; `infer` may be called from
    one thread at a time; `close` frees the engines.

    Attributes:
        graphs: The bundle's graphs, in whose three stages an inference runs.
    """

    def __init__(self, bundle: Bundle, engines: dict[str, Engine]) -> None:
        """Wire a verified bundle to its engines; users call `Policy.load`."""
        self._bundle = bundle
        self._engines = engines
        self.graphs: ReferenceGraphs | DeployedGraphs = (
            DeployedGraphs(bundle, engines)
            if bundle.manifest.family == DEPLOYED
            else ReferenceGraphs(bundle, engines)
        )
        # The instructions of the bank are known now, and a new one is no matter of every chunk.
        self.graphs.release_tokenizer()
        self._time_from_start_s: Float64Array = (
            np.array(bundle.processor.delta_indices, np.float64)
            * bundle.manifest.robot.action_period_s
        )

    @classmethod
    def load(
        cls,
        bundle: Path,
        *,
        engine: str = "onnxruntime",
        threads: int | None = None,
        verify_hashes: bool = True,
        denoising_steps: int | None = None,
        int8_kernels: bool = False,
        progress: Callable[[str], None] = lambda text: None,
    ) -> Policy:
        """Verify a bundle and load it.

        Args:
            bundle: The bundle's folder.
            engine: Which engine runs the graphs; see `engines.ENGINE_KINDS`.
            threads: CPU threads inside an operator; the engine's choice if None.
            verify_hashes: See `open_bundle`.
            denoising_steps: Euler steps, at least 1; those of the bundle if None.
            int8_kernels: See `load_engine`.
            progress: Told what is being done, many times a second. What it raises ends the work.

        Raises:
            BundleError: The bundle is missing, damaged or of another schema.
            ProcessorError: Its processor files are wrong.
            EngineError: A graph does not load, or `groot-int8 verify-engines` found its engine
                wrong.
            ConfigurationError: `denoising_steps` is below 1, or another number than deployed
                graphs have unrolled.
        """
        opened = open_bundle(
            bundle,
            verify_hashes=verify_hashes,
            # A TensorRT engine has a hash of its own and names those of the graph it is made of.
            verify_engine_graphs=engine != "tensorrt",
            progress=progress,
        )
        if denoising_steps is not None:
            opened = _with_steps(opened, denoising_steps)
        if engine == "tensorrt":
            refuse_failed_engines(opened)
        engines: dict[str, Engine] = {}
        try:
            names = opened.manifest.engine_graphs
            for number, name in enumerate(names, 1):
                progress(f"loading {name} with {engine}, {number} of {len(names)}")
                engines[name] = load_engine(
                    engine,
                    opened.graph_path(name),
                    threads=threads,
                    verify_hashes=verify_hashes,
                    int8_kernels=int8_kernels,
                )
                opened.check_engine(name, engines[name])
            return cls(opened, engines)
        except BaseException:
            for loaded in engines.values():
                loaded.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """What the bundle was made from."""
        return self._bundle.manifest

    @property
    def processor(self) -> Processor:
        """The embodiment's observation and action conventions."""
        return self._bundle.processor

    @property
    def robot(self) -> RobotDescription:
        """Cameras, joints and action period."""
        return self._bundle.manifest.robot

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise: (action horizon, max_action_dim)."""
        return self.manifest.action_horizon, self.processor.max_action_dim

    @property
    def time_from_start_s(self) -> Float64Array:
        """When each row of a chunk is due after its observation, float64, shape (steps,)."""
        return self._time_from_start_s

    @property
    def folder(self) -> Path:
        """The bundle's folder."""
        return self._bundle.folder

    @property
    def remarks(self) -> tuple[str, ...]:
        """What whoever runs the policy should know of how its engines were loaded."""
        return tuple(
            f"{name}: {remark}"
            for name, engine in self._engines.items()
            for remark in engine.remarks
        )

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions of the bank; of reference graphs, which need none, empty."""
        return self.graphs.bank.instructions if isinstance(self.graphs, DeployedGraphs) else ()

    def check_instruction(self, instruction: str) -> None:
        """Raise if an instruction cannot be used, or not yet.

        Raises:
            UnknownInstructionError: Its prefix has to be computed first; see `add_prefix`.
            ObservationError: It cannot be used.
        """
        self.graphs.check_instruction(instruction)

    def add_prefix(self, prefix: PromptPrefix) -> None:
        """Take in the prefix of a new instruction; see `prefix_model`.

        Raises:
            BundleError: It is of another checkpoint or does not fit the graphs.
        """
        assert isinstance(self.graphs, DeployedGraphs)
        self.graphs.bank.add(prefix)

    def warm_up(self, instruction: str) -> None:
        """Run every graph once on a made-up observation, so that the first real one is not slow.

        Args:
            instruction: Whose length and prefix are used if it is known; else one of the bank, or
                none.

        Raises:
            EngineError: A graph failed.
        """
        observation = Observation(
            images={
                camera.key: np.zeros((camera.height, camera.width, 3), np.uint8)
                for camera in self.robot.cameras
            },
            state={
                key: np.zeros(len(joints), np.float32)
                for key, joints in self.robot.state_joints.items()
            },
            instruction=instruction,
        )
        graphs = self.graphs
        if isinstance(graphs, DeployedGraphs) and not self._knows(instruction):
            if not self.instructions:
                inputs = graphs.blank(observation)
                noise = draw_noise(DEFAULT_SEED, 0, self.noise_shape)
                graphs.actions(inputs, graphs.features(inputs), noise)
                return
            instruction = self.instructions[0]
        elif not self._knows(instruction):
            instruction = "warm up"
        self.infer(replace(observation, instruction=instruction))

    def _knows(self, instruction: str) -> bool:
        try:
            self.check_instruction(instruction)
        except ObservationError:
            return False
        return True

    @contextmanager
    def observed(self, observer: GraphObserver) -> Iterator[None]:
        """Show an observer every graph's inputs while the block runs.

        Args:
            observer: Called before each run of a graph with its name (see `families`) and its
                inputs, in the order of the runs. It must not change the arrays, and copies what
                it keeps: an engine may use its output buffers again.
        """
        if self.graphs.observer is not None:
            raise RuntimeError("the policy is observed already")
        self.graphs.observer = observer
        try:
            yield
        finally:
            self.graphs.observer = None

    def infer(
        self,
        observation: Observation,
        noise: Float32Array | None = None,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        """Answer one observation.

        Args:
            observation: Frames, joint values and instruction.
            noise: Initial noise of the flow, float32, of `noise_shape`. None draws it from `seed`
                and the observation's stamp.
            seed: Seed of the noise, `DEFAULT_SEED` if None. May not be given beside `noise`.
            committed: Rows of the chunk that are executed whatever the answer is; the other rows
                are made to fit to them.

        Returns:
            The chunk in physical units, with the wall time of each stage in seconds:
            `preprocess`, `backbone`, `action_head`, `postprocess`, `total`.

        Raises:
            ObservationError: The observation cannot be used.
            EngineError: A graph failed, or gave values that are not finite.
        """
        timings: dict[str, float] = {}
        with _timed(timings, "total"):
            noise, used_seed = self._noise(observation, noise, seed)
            with _timed(timings, "preprocess"):
                inputs: Any = self.graphs.preprocess(observation)
                rows = None
                if committed is not None:
                    rows = CommittedRows.encoded(
                        self.processor, self.noise_shape[0], committed, observation.state
                    )
            with _timed(timings, "backbone"):
                features: Any = self.graphs.features(inputs)
            with _timed(timings, "action_head"):
                action_pred = self.graphs.actions(inputs, features, noise, rows)
            with _timed(timings, "postprocess"):
                actions = decode_actions(self.processor, action_pred, observation.state)
        return ActionChunk(
            actions=actions,
            stamp_ns=observation.stamp_ns,
            time_from_start_s=self._time_from_start_s,
            action_pred=action_pred,
            seed=used_seed,
            timings_s=timings,
            committed=committed,
        )

    def close(self) -> None:
        """Free the engines; the policy cannot be used afterwards."""
        for engine in self._engines.values():
            engine.close()

    def _noise(
        self, observation: Observation, noise: Float32Array | None, seed: int | None
    ) -> tuple[Float32Array, int | None]:
        if noise is None:
            used = DEFAULT_SEED if seed is None else seed
            return draw_noise(used, observation.stamp_ns, self.noise_shape), used
        if seed is not None:
            raise ObservationError("give either noise or a seed, not both")
        if noise.shape != self.noise_shape or not np.isfinite(noise).all():
            raise ObservationError(
                f"the noise must be finite and of shape {self.noise_shape}, not {noise.shape}"
            )
        return noise.astype(np.float32, copy=False), None


def _with_steps(bundle: Bundle, steps: int) -> Bundle:
    own = bundle.manifest.denoising_steps
    if steps < 1:
        raise ConfigurationError(f"denoising_steps is {steps}: the flow needs at least one step")
    if steps != own and bundle.manifest.family == DEPLOYED:
        raise ConfigurationError(
            f"denoising_steps is {steps}, and the bundle's graphs have {own} steps unrolled. "
            f"Leave it at {own}, or export again: groot-int8 export --denoising-steps {steps}"
        )
    return replace(bundle, manifest=replace(bundle.manifest, denoising_steps=steps))


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
