"""Hazards of a benchmark: other work on each side, warm-up counted in, inputs that change."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.types import ActionChunk, Float32Array, Observation
from offline_tools.benchmark import runs
from offline_tools.benchmark.fixture import (
    generate_inputs,
    read_inputs,
    refuse_other_robot,
    write_inputs,
)
from offline_tools.benchmark.memory import process_memory
from offline_tools.cli import main
from offline_tools.cost.onnx_count import count_graph


def test_frozen_inputs_read_back_to_the_bit_and_follow_their_seed(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    made = generate_inputs(bundle, "do it", 2, seed=3)
    write_inputs(tmp_path / "inputs.npz", made)
    read = read_inputs(tmp_path / "inputs.npz")
    for one, other in zip(made.observations, read.observations, strict=True):
        assert (one.instruction, one.stamp_ns) == (other.instruction, other.stamp_ns)
        for key, image in one.images.items():
            assert np.array_equal(image, other.images[key])
            assert len(np.unique(image)) > 100
    assert all(map(np.array_equal, made.noise, read.noise))
    new = generate_inputs(bundle, "do it", 2, seed=4)
    images = [inputs.observations[0].images["front"] for inputs in (made, new)]
    assert not np.array_equal(images[0], images[1])
    assert made.sha256 == read.sha256 == generate_inputs(bundle, "do it", 2, seed=3).sha256
    assert made.sha256 != new.sha256


def test_hash_of_the_inputs_sees_every_kind_of_value(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    made = generate_inputs(bundle, "do it", 2, seed=3)
    first, second = made.observations
    noise = made.noise[1].copy()
    noise[-1, -1] += 1e-3
    image = first.images["front"].copy()
    image[0, 0, 0] ^= 1
    changes: list[dict[str, Any]] = [
        {"images": {**first.images, "front": image}},
        {"state": {key: value + 1 for key, value in first.state.items()}},
        {"instruction": "do that"},
    ]
    others = [
        replace(made, noise=(made.noise[0], noise)),
        replace(made, observations=(second, first)),
        *(replace(made, observations=(replace(first, **one), second)) for one in changes),
    ]
    assert len({inputs.sha256 for inputs in (made, *others)}) == 1 + len(others)


def test_report_names_its_inputs_whether_made_or_read(
    small_deployed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "inputs.npz")

    def reported(*words: str) -> str:
        output = tmp_path / words[0]
        command = ["benchmark", "--bundle", str(small_deployed), "--output", str(output)]
        command += ["--rounds", "1", "--warmup", "0", "--no-memory", *words]
        assert main(command) == 0
        content = json.loads((output / "benchmark.json").read_text())
        found: str = content["settings"]["inputs_sha256"]
        out = capsys.readouterr().out
        assert f"inputs: sha256 {found}" in out
        assert f"\n{content['settings']['library']}, 1 rounds" in out
        assert content["settings"]["library"].startswith("ONNX Runtime 1.")
        return found

    made, read = reported("--write-inputs", file), reported("--inputs", file)
    assert made == read == read_inputs(Path(file)).sha256
    assert reported("--seed", "1") != made


def test_inputs_of_another_robot_are_refused_by_what_differs(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    inputs = generate_inputs(bundle, "do it", 1, seed=0)
    del inputs.observations[0].images["wrist"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="camera wrist differ"):
        refuse_other_robot(inputs, bundle)
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ConfigurationError, match="--write-inputs"):
        read_inputs(tmp_path / "no.npz")


def _without_instructions_of_another_robot(manifest: dict[str, Any]) -> None:
    manifest["robot"]["action_period_s"] = 9.0
    manifest["prompts"]["instructions"].clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(checkpoint_sha256="0" * 64), "has another checkpoint than"),
        # And not that the banks have no instruction in common.
        (_without_instructions_of_another_robot, "has another robot description"),
    ],
)
def test_bundles_of_different_policies_are_not_compared(
    small_deployed: Path,
    small_copy: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    manifest = small_copy / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    command = ["benchmark", "--bundle", str(small_deployed), str(small_copy), "--no-memory"]
    assert main([*command, "--rounds", "1"]) == 2
    assert message in capsys.readouterr().err


def test_missing_tensorrt_is_told_before_anything_is_measured(
    small_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["benchmark", "--bundle", str(small_copy), "--engine", "tensorrt"]) == 2
    told = capsys.readouterr().err
    assert "TensorRT cannot be imported" in told
    assert "measuring the memory" not in told


def _contender(log: list[str], name: str, seconds: Callable[[int], float]) -> runs.Answer:
    def answer(observation: Observation, noise: Float32Array) -> ActionChunk:
        log.append(f"{name}{observation.stamp_ns}")
        took = seconds(len([entry for entry in log if entry.startswith(name)]))
        return ActionChunk(
            actions={},
            stamp_ns=0,
            time_from_start_s=np.zeros(1),
            action_pred=noise * 2,
            seed=None,
            timings_s=dict.fromkeys(runs.STAGES, took),
        )

    return answer


def test_contenders_take_turns_on_the_same_inputs_and_warm_up_is_apart(tiny_bundle: Path) -> None:
    inputs = generate_inputs(open_bundle(tiny_bundle), "do it", 2, seed=0)
    log: list[str] = []
    # Both slow down alike as the rounds go on, as a machine does that gets hot.
    slow = _contender(log, "a", lambda call: 9.0 if call <= 2 else 0.4 * call)
    fast = _contender(log, "b", lambda call: 9.0 if call <= 2 else 0.1 * call)
    times = runs.run_interleaved([slow, fast], inputs, rounds=4, warmup=2)
    # The order rotates, so neither always runs behind the other; both see the same inputs.
    assert log == ["a0", "b0", "b1", "a1", "a0", "b0", "b1", "a1", "a0", "b0", "b1", "a1"]
    assert times[0].warmup_s.tolist() == [9.0, 9.0]
    figure = runs.figure(times[1], times[0], "total")
    assert figure.ratio == pytest.approx(4.0)
    assert (figure.ratio_low, figure.ratio_high) == pytest.approx((4.0, 4.0))
    assert figure.median_ms == pytest.approx(450.0)
    assert runs.relative_l2(times[1].answers, times[0].answers) == 0.0


def test_memory_of_the_process_is_read_in_bytes() -> None:
    assert 10e6 < process_memory("VmRSS") <= process_memory("VmHWM") < 1e12


@pytest.mark.slow
def test_both_families_are_timed_in_one_run_with_their_actions_compared(
    tiny_bundle: Path,
    deployed_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "report"
    command = ["benchmark", "--bundle", str(tiny_bundle), str(deployed_bundle)]
    command += ["--rounds", "3", "--warmup", "1", "--profile", "--output", str(output)]
    assert main(command) == 0
    content = json.loads((output / "benchmark.json").read_text())
    reference, deployed = content["contenders"]
    assert reference["description"].startswith("reference graphs")
    assert deployed["description"].startswith("deployed graphs")
    assert 0 < deployed["relative_l2"] < 1e-4
    bundle = open_bundle(deployed_bundle)
    # The prefix model is in the bundle too, and no engine runs it.
    sizes = {name: size for name, (_, size) in bundle.manifest.files.items() if "onnx/" in name}
    run = [size for name, size in sizes.items() if not name.startswith("onnx/prefix")]
    assert deployed["weight_bytes"] == sum(run) < sum(sizes.values())
    assert 0 < deployed["memory"]["runtime_bytes"] < deployed["memory"]["loaded_bytes"]
    assert deployed["figures"]["total"]["ratio"] > 0
    assert (output / "benchmark.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "| ratio (5 to 95 % of the rounds) |" in printed
    runs = {graph["graph"]: graph["runs"] for graph in reference["profile"]}
    assert runs == {
        "backbone": 1,
        "conditioner": 1,
        "action_encoder": 2,
        "dit": 2,
        "action_decoder": 2,
    }
    head = next(graph for graph in deployed["profile"] if graph["graph"] == "action_head")
    # Counted from the graph's file, without a run of it.
    work = count_graph(bundle.graph_path("action_head"), "action_head", 1, {})
    flops = sum(launch.flops for launch in work.launches if launch.weight)
    assert head["weight_gflop"] == pytest.approx(1e-9 * flops)
    (line,) = [line for line in printed.splitlines() if "| action_head, 1 |" in line]
    shares = [float(share) for share in re.findall(r"([\d.]+) %", line)]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)


@pytest.mark.slow
def test_the_nodes_own_cost_is_measured_over_dds(
    small_deployed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
    output = tmp_path / "node.json"
    command = ["benchmark-node", "--bundle", str(small_deployed), "--seconds", "4"]
    assert main([*command, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    streams = {f"camera {c.key}" for c in open_bundle(small_deployed).manifest.robot.cameras}
    assert {name for name, count in figures["received"].items() if count} == {
        *streams,
        "joint_state",
    }
    assert figures["chunks"] > 0
    road = figures["arrival_to_engine_ms"]
    assert 0.0 < road["median"] <= road["p99"] <= road["max"]
    assert 0.0 < figures["callbacks_core_share"] < figures["process_core_share"]
    assert "| arrival of the newest frame to engine input, median |" in capsys.readouterr().out
