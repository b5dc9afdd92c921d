"""The files in deploy/: units that systemd knows every setting of, paths and commands that exist.

No unit is started and no image is built here; docs/deployment.md says so, too.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = ("groot-executor.service", "groot-policy.service")
# Where docs/deployment.md puts the repository.
INSTALLED = "/opt/groot_int8_ros"


def _verify(unit: Path) -> str:
    """Return what systemd has to say against a unit; nothing if all is well."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here, and nothing else knows the settings")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")


def _copy(repository_root: Path, name: str, folder: Path) -> Path:
    text = (repository_root / "deploy/systemd" / name).read_text(encoding="utf-8")
    copy = folder / name
    copy.write_text(text.replace(f"ExecStart={INSTALLED}", f"ExecStart={repository_root}"))
    return copy


@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_against_a_unit_and_would_notice_a_misspelt_setting(
    repository_root: Path, tmp_path: Path, name: str
) -> None:
    unit = _copy(repository_root, name, tmp_path)
    assert _verify(unit) == ""
    unit.write_text(unit.read_text().replace("TimeoutStopSec=", "TimeoutStopSecs="))
    assert "TimeoutStopSecs" in _verify(unit)


def test_executor_is_never_tied_to_the_policy_and_memory_is_taken_from_the_policy(
    repository_root: Path,
) -> None:
    executor, policy = (
        (repository_root / "deploy/systemd" / name).read_text(encoding="utf-8") for name in UNITS
    )
    settings = [line for line in executor.splitlines() if not line.startswith(("#", "Desc"))]
    assert not [line for line in settings if "policy" in line]
    # After= orders the start alone; any of these would stop one with the other.
    for word in ("Requires", "BindsTo", "PartOf", "Requisite", "Conflicts"):
        assert f"{word}=" not in executor + policy
    adjusts = [
        int(re.findall(r"^OOMScoreAdjust=(.*)$", text, re.M)[0]) for text in (executor, policy)
    ]
    assert adjusts[0] < 0 < adjusts[1]


@pytest.mark.parametrize("name", UNITS)
def test_variables_of_a_unit_are_in_its_environment_file(repository_root: Path, name: str) -> None:
    folder = repository_root / "deploy/systemd"
    given = re.findall(r"^(\w+)=", (folder / "groot.env").read_text(encoding="utf-8"), re.M)
    used = re.findall(r"\$\{(\w+)", (folder / name).read_text(encoding="utf-8"))
    assert used
    assert set(used) <= set(given)


def test_commands_that_units_and_image_run_are_installed_by_the_package(
    repository_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: dict[str, object] = {}
    monkeypatch.chdir(repository_root)
    monkeypatch.setattr("setuptools.setup", described.update)
    runpy.run_path("setup.py")
    entry_points = described["entry_points"]
    assert isinstance(entry_points, dict)
    known = {line.split(" = ")[0] for line in entry_points["console_scripts"]}
    texts = [(repository_root / "deploy/systemd" / name).read_text() for name in UNITS]
    run = [re.findall(r"^ExecStart=\S+ (\S+)", text, re.M)[0] for text in texts]
    image = (repository_root / "deploy/Dockerfile").read_text()
    run += re.findall(r'^CMD \["([\w-]+)"', image, re.M)
    assert len(run) == 3
    assert set(run) <= known


def test_what_the_image_copies_exists_and_is_all_that_an_installation_needs(
    repository_root: Path,
) -> None:
    image = (repository_root / "deploy/Dockerfile").read_text(encoding="utf-8")
    copied = [
        source for line in re.findall(r"^COPY (.+)$", image, re.M) for source in line.split()[:-1]
    ]
    assert [source for source in copied if not (repository_root / source).exists()] == []
    setup = (repository_root / "setup.py").read_text(encoding="utf-8")
    folders = re.findall(r'files\("(\w+)"', setup)
    assert {"groot_int8_ros", "offline_tools", "setup.py", "resource", *folders} <= set(copied)
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/l4t-jetpack:r36\.4\.\d+$", image, re.M)
    # A continued line must not be followed by a comment's end of the instruction.
    assert not re.search(r"\\ +$", image, re.M)


def test_entrypoint_is_an_executable_script_that_bash_parses(repository_root: Path) -> None:
    script = repository_root / "deploy/entrypoint.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    last = script.read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert last == 'exec "$@"', "without exec SIGTERM would reach the shell and not the node"
