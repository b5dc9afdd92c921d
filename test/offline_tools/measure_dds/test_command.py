"""The measurement of frames between processes: what it counts is what was sent."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from offline_tools.bags.dds import TRANSPORTS_VARIABLE
from offline_tools.cli import main
from offline_tools.measure_dds.command import SETTINGS


def test_small_frames_all_arrive_and_are_counted_for_each_camera(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    options = ("--cameras", "2", "--size", "32x24", "--rate", "5", "--seconds", "1")
    assert main(["measure-dds", *options, "--reliable", "--settings", "UDPv4", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["setting"], row["sent"]) == ("UDPv4", 10)
    # A subscription of depth 1 may skip a frame when the machine is busy, but not most of them.
    assert 2 <= row["received"] <= 10
    assert 0.0 < row["worst_camera"] <= 1.0
    assert 0.0 < row["median_ms"] <= row["p99_ms"]


def test_default_measures_without_the_variable_of_the_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A transport that does not exist: a process that inherited it would not hear anything.
    monkeypatch.setenv("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    monkeypatch.setenv(TRANSPORTS_VARIABLE, "NONE_SUCH")
    options = ("--cameras", "1", "--size", "32x24", "--rate", "5", "--seconds", "1")
    assert main(["measure-dds", *options, "--settings", "UDPv4"]) == 0
    table = capsys.readouterr().out
    assert "| UDPv4 | 5 |" in table
    assert SETTINGS["default"] is None


def test_size_that_is_none_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure-dds", "--size", "640"]) == 2
    assert "--size" in capsys.readouterr().err
