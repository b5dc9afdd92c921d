"""What the doctor says of a machine: the power mode by its files, engines that are not here."""

from __future__ import annotations

import importlib.util
import os
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.engine_report import (
    EngineReport,
    EnginesHere,
    read_engine_report,
    report_path,
)
from offline_tools.bags.dds import RANGE_VARIABLE, TRANSPORTS_VARIABLE
from offline_tools.doctor import machine
from offline_tools.doctor.findings import Finding, Level, exit_code
from offline_tools.doctor.machine import examine_bundle, examine_engine, examine_power

# The layout of the real file, whose fastest mode has not always the highest or lowest number.
NVPMODEL = """\
< PARAM TYPE=CLOCK NAME=GPU >
MAX_FREQ /sys/devices/platform/17000000.gpu/devfreq_dev/max_freq
< POWER_MODEL ID=0 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
GPU MIN_FREQ 0
GPU MAX_FREQ -1
< POWER_MODEL ID=1 NAME=10W >
GPU MAX_FREQ 612000000
< POWER_MODEL ID=2 NAME=25W >
GPU MAX_FREQ 918000000
# mandatory section to configure the default mode
< PM_CONFIG DEFAULT=2 >
"""


def jetson(root: Path, status: str) -> Path:
    for file, text in (
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3"),
        ("etc/nvpmodel.conf", NVPMODEL),
        ("var/lib/nvpmodel/status", status),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root


def test_slow_power_mode_is_told_with_the_command_of_the_fastest(tmp_path: Path) -> None:
    found = examine_power(jetson(tmp_path, "pmode:0001 fmode:quiet"))
    assert found.level is Level.WARNING
    assert found.message.startswith("10W")
    assert "nvpmodel -m 0" in found.advice
    fastest = examine_power(jetson(tmp_path, "pmode:0000"))
    assert (fastest.level, fastest.message) == (Level.OK, "MAXN_SUPER")


@pytest.mark.parametrize("status", ["", "pmode:0009", "nonsense"])
def test_power_mode_that_cannot_be_read_is_not_passed_off_as_fine(
    tmp_path: Path, status: str
) -> None:
    assert examine_power(jetson(tmp_path, status)).level is Level.UNCHECKED
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert examine_power(tmp_path).level is Level.UNCHECKED


@pytest.mark.parametrize(
    ("transports", "reach", "words"),
    [
        ("LARGE_DATA", "LOCALHOST", "no effect"),
        (None, None, "not set"),
        ("LARGE_DATA", None, None),
    ],
)
def test_transport_setting_without_effect_is_told(
    monkeypatch: pytest.MonkeyPatch, transports: str | None, reach: str | None, words: str | None
) -> None:
    monkeypatch.delenv("RMW_IMPLEMENTATION", raising=False)
    for name, value in ((TRANSPORTS_VARIABLE, transports), (RANGE_VARIABLE, reach)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    found = machine.examine_middleware()
    assert found.level is (Level.OK if words is None else Level.WARNING)
    assert (words or "LARGE_DATA") in found.message


def test_missing_bundle_is_unchecked_and_a_wrong_one_a_fault(tmp_path: Path) -> None:
    bundle, findings = examine_bundle(None, verify_hashes=True)
    assert bundle is None
    assert exit_code(findings) == 2
    bundle, findings = examine_bundle(tmp_path, verify_hashes=True)
    assert bundle is None
    assert exit_code(findings) == 1
    assert str(tmp_path) in findings[0].message


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_tensorrt_engine_on_a_machine_without_tensorrt_is_a_fault(small_deployed: Path) -> None:
    bundle = open_bundle(small_deployed)
    (found,) = examine_engine(bundle, "tensorrt", verify_hashes=True)
    assert found.level is Level.FAULT
    assert "JetPack" in found.message
    (found,) = examine_engine(bundle, "tensorflow", verify_hashes=True)
    assert "onnxruntime, tensorrt" in found.advice


def test_bundle_larger_than_the_free_memory_is_a_fault(
    small_deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(small_deployed)
    weights = sum(
        path.stat().st_size
        for name in bundle.manifest.engine_graphs
        for path in (bundle.graph_path(name).parent).glob(bundle.graph_path(name).name + "*")
    )
    for free, level in ((weights, Level.OK), (weights - 1, Level.FAULT)):
        monkeypatch.setattr(machine, "available_host_bytes", lambda free=free: free)
        _, memory = examine_engine(bundle, "onnxruntime", verify_hashes=True)
        assert (memory.subject, memory.level) == ("memory", level)
    # A node that has loaded it took that memory itself.
    _, memory = examine_engine(bundle, "onnxruntime", verify_hashes=True, is_loaded=True)
    assert memory.level is Level.OK


def test_a_finding_is_one_line_whatever_its_message() -> None:
    text = Finding(Level.FAULT, "bundle", "first\nsecond", "do this").text()
    assert text.count("\n") == 0
    assert text.endswith("-> do this")


_HASHES = {"backbone": "a" * 64, "action_head": "b" * 64}


@pytest.mark.parametrize(
    ("compared", "level", "says"),
    [
        pytest.param(None, Level.WARNING, "never compared", id="never"),
        pytest.param({"engines": {}}, Level.WARNING, "built again since", id="built again"),
        pytest.param(
            {"relative_l2": 0.12, "passed": False}, Level.FAULT, "12 % off", id="too far off"
        ),
        pytest.param(
            {"relative_l2": None, "passed": False}, Level.FAULT, "not finite", id="not finite"
        ),
        pytest.param({}, Level.OK, "1 % off", id="right"),
    ],
)
def test_engines_that_were_not_compared_with_their_graphs_or_are_wrong_are_named(
    tmp_path: Path, compared: dict[str, Any] | None, level: Level, says: str
) -> None:
    manifests: Any = {
        name: types.SimpleNamespace(
            engine_sha256=sha256, build_options=("--graph", name, "--exact")
        )
        for name, sha256 in _HASHES.items()
    }
    here = EnginesHere(tmp_path / "engines" / "10.3.0-orin-sm87", "a GPU", manifests)
    if compared is not None:
        right = EngineReport(
            engines=_HASHES,
            device="a GPU",
            source="noise",
            samples=3,
            relative_l2=0.01,
            max_error=0.03,
            passed=True,
        )
        replace(right, **compared).write(report_path(tmp_path, here.folder))
    found = machine.examine_answers(tmp_path, here)
    assert found.level is level
    assert says in found.message
    if level is not Level.OK:
        assert f"groot-int8 verify-engines --bundle {tmp_path}" in found.advice
    if level is Level.FAULT:
        assert f"groot-int8 build --bundle {tmp_path} --exact" in found.advice


def test_a_damaged_report_counts_as_none(tmp_path: Path) -> None:
    whole = EngineReport(_HASHES, "a GPU", "noise", 3, 0.2, 0.03, passed=False)
    whole.write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert read_engine_report(tmp_path / "report.json") == whole
    texts = ["", "[]", '{"passed": true}', "\x00", "[" * 100_000]
    # A robot must not stop over a report that says nothing.
    texts += [text.replace("0.2", '"much"'), text.replace("false", "1")]
    for text in texts:
        (tmp_path / "report.json").write_text(text)
        assert read_engine_report(tmp_path / "report.json") is None


def test_a_report_that_this_user_may_not_read_is_not_taken_for_none(tmp_path: Path) -> None:
    path = report_path(tmp_path, tmp_path / "engines" / "10.3.0-orin-sm87")
    EngineReport(_HASHES, "a GPU", "noise", 3, 0.2, 0.03, passed=False).write(path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(EngineError, match=r"Permission denied.* wrong") as found:
            read_engine_report(path)
    finally:
        os.seteuid(user)
    assert f"chmod -R a+rX {tmp_path / 'reports'}" in str(found.value)


def test_engines_whose_report_cannot_be_read_are_a_fault(tmp_path: Path) -> None:
    here = EnginesHere(tmp_path / "engines" / "10.3.0-orin-sm87", "a GPU", {})
    report_path(tmp_path, here.folder).mkdir(parents=True)  # which root cannot read either
    found = machine.examine_answers(tmp_path, here)
    assert found.level is Level.FAULT
    assert f"groot-int8 verify-engines --bundle {tmp_path}" in found.message
