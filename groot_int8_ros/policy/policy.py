"""From an observation to an action chunk: the one place where the graphs are run in order.

Owns: `Policy` and the noise of the flow. Must not import ROS or torch: the node, a notebook, the
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
from numpy.typing import NDArray

from groot_int8_ros.errors import ConfigurationError, ObservationError
from groot_int8_ros.policy.bundle import GRAPH_FILES, Bundle, Manifest, open_bundle
from groot_int8_ros.policy.engines import Engine, Tensors, load_engine
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.preprocess import ModelInputs, Preprocessor, PromptTokenizer
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import ActionChunk, Float32Array, Observation

DEFAULT_SEED = 0

# Called with a graph's name and its inputs before each run.
GraphObserver = Callable[[str, Tensors], None]


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
    """

    def __init__(self, bundle: Bundle, engines: dict[str, Engine]) -> None:
        """Wire a verified bundle to its engines; users call `Policy.load`."""
        self._bundle = bundle
        self._engines = engines
        self._observer: GraphObserver | None = None
        self._preprocess = Preprocessor(
            bundle.processor,
            PromptTokenizer.from_file(bundle.tokenizer_path),
            bundle.manifest.robot.cameras,
        )
        self._time_from_start_s = (
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
    ) -> Policy:
        """Verify a bundle and load it.

        Args:
            bundle: The bundle's folder.
            engine: Which engine runs the graphs; see `engines.ENGINE_KINDS`.
            threads: CPU threads inside an operator; the engine's choice if None.
            verify_hashes: See `open_bundle`.
            denoising_steps: Euler steps, at least 1; those of the bundle if None.

        Raises:
            BundleError: The bundle is missing, damaged or of another schema.
            ProcessorError: Its processor files are wrong.
            EngineError: A graph does not load.
            ConfigurationError: `denoising_steps` is below 1.
        """
        opened = open_bundle(bundle, verify_hashes=verify_hashes)
        if denoising_steps is not None:
            if denoising_steps < 1:
                raise ConfigurationError(
                    f"denoising_steps is {denoising_steps}: the flow needs at least one step"
                )
            opened = replace(
                opened, manifest=replace(opened.manifest, denoising_steps=denoising_steps)
            )
        engines: dict[str, Engine] = {}
        try:
            for name in GRAPH_FILES:
                engines[name] = load_engine(
                    engine,
                    opened.graph_path(name),
                    threads=threads,
                    verify_hashes=verify_hashes,
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

    def check_instruction(self, instruction: str) -> None:
        """Raise `ObservationError` if an instruction cannot be used."""
        self._preprocess.check_instruction(instruction)

    @contextmanager
    def observed(self, observer: GraphObserver) -> Iterator[None]:
        """Show an observer every graph's inputs while the block runs.

        Args:
            observer: Called before each run of a graph with its name (see `GRAPH_FILES`) and its
                inputs, in the order of the runs. It must not change the arrays, and copies what
                it keeps: an engine may use its output buffers again.
        """
        if self._observer is not None:
            raise RuntimeError("the policy is observed already")
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def infer(
        self,
        observation: Observation,
        noise: Float32Array | None = None,
        seed: int | None = None,
    ) -> ActionChunk:
        """Answer one observation.

        Args:
            observation: Frames, joint values and instruction.
            noise: Initial noise of the flow, float32, of `noise_shape`. None draws it from `seed`
                and the observation's stamp.
            seed: Seed of the noise, `DEFAULT_SEED` if None. May not be given beside `noise`.

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
                inputs = self._preprocess(observation)
            with _timed(timings, "backbone"):
                features = self.backbone_features(inputs)
            with _timed(timings, "action_head"):
                action_pred = self.denoise(features, inputs.state, noise)
            with _timed(timings, "postprocess"):
                actions = decode_actions(self.processor, action_pred, observation.state)
        return ActionChunk(
            actions=actions,
            stamp_ns=observation.stamp_ns,
            time_from_start_s=self._time_from_start_s,
            action_pred=action_pred,
            seed=used_seed,
            timings_s=timings,
        )

    def preprocess(self, observation: Observation) -> ModelInputs:
        """Return the backbone's inputs for an observation; see `Preprocessor`."""
        return self._preprocess(observation)

    def backbone_features(self, inputs: ModelInputs) -> dict[str, NDArray[Any]]:
        """Run the backbone.

        Returns:
            `hidden_states` (1, S, D) floating, `attn_mask` and `image_mask` bool (1, S).
        """
        return self._run(
            "backbone",
            {
                "input_ids": inputs.input_ids,
                "attention_mask": inputs.attention_mask,
                "pixel_values": inputs.pixel_values,
            },
        )

    def denoise(
        self, features: dict[str, NDArray[Any]], state: Float32Array, noise: Float32Array
    ) -> Float32Array:
        """Integrate the flow from noise to normalised actions with Euler steps.

        Args:
            features: What `backbone_features` gave.
            state: Normalised state, float32, shape (1, max_state_dim).
            noise: float32, of `noise_shape`.

        Returns:
            Normalised actions, float32, of `noise_shape`.
        """
        condition = self._run(
            "conditioner", {"hidden_states": features["hidden_states"], "state": state}
        )
        steps = self.manifest.denoising_steps
        actions: Float32Array = noise[None]
        for step in range(steps):
            timestep = np.array([int(step / steps * self.manifest.timestep_buckets)], np.int64)
            encoded = self._run(
                "action_encoder",
                {
                    "state_features": condition["state_features"],
                    "actions": actions,
                    "timestep": timestep,
                },
            )
            output = self._run(
                "dit",
                {
                    "sa_embs": encoded["sa_embs"],
                    "vl_embs": condition["vl_embs"],
                    "timestep": timestep,
                    "image_mask": features["image_mask"],
                    "backbone_attention_mask": features["attn_mask"],
                },
            )
            decoded = self._run("action_decoder", {"dit_output": output["output"]})
            velocity: Float32Array = decoded["velocity"]
            actions = actions + velocity / np.float32(steps)
        action_pred: Float32Array = actions[0]
        return action_pred

    def close(self) -> None:
        """Free the engines; the policy cannot be used afterwards."""
        for engine in self._engines.values():
            engine.close()

    def _run(self, name: str, feeds: Tensors) -> dict[str, NDArray[Any]]:
        if self._observer is not None:
            self._observer(name, feeds)
        return self._engines[name].run(feeds)

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


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
