"""The package after `pip install` and after `colcon build`: nothing forgotten, commands in place.

Builds leave files beside the sources, so each starts from its own copy in a temporary folder and
the repository stays as it is. The installations are asked in processes of their own, started
outside the sources, so that what they show is what was installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_NOT_SOURCES = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "install", "log", "demo_output"
)
_COMMANDS = {"groot-int8", "policy_node", "calibration_recorder_node", "chunk_executor_node"}
_LOCKED_PYTHONS = ["3.10", "3.11", "3.12"]


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _site_packages(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"


def _names(folder: Path, pattern: str = "*") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def _assert_share_is_complete(prefix: Path, sources: Path) -> None:
    share = prefix / "share" / "groot_int8_ros"
    marker = prefix / "share" / "ament_index" / "resource_index" / "packages" / "groot_int8_ros"
    assert marker.is_file()
    assert (share / "package.xml").read_bytes() == (sources / "package.xml").read_bytes()
    assert _names(share / "launch", "*.py") == _names(sources / "launch", "*.py") != set()
    assert _names(share / "config", "*.yaml") == _names(sources / "config", "*.yaml") != set()


def _modules(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for package in ("groot_int8_ros", "offline_tools")
        for path in (root / package).rglob("*.py")
    }


@pytest.fixture(scope="module")
def sources(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a clone has them; only read."""
    copy = tmp_path_factory.mktemp("sources") / "groot_int8_ros"
    shutil.copytree(repository_root, copy, ignore=_NOT_SOURCES)
    return copy


@pytest.fixture(scope="module")
def pip_prefix(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed the package from an sdist of it, without its dependencies."""
    work = tmp_path_factory.mktemp("pip")
    tree = work / "tree"
    shutil.copytree(sources, tree)
    build = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    _run(sys.executable, "-W", "ignore", "-c", build, cwd=tree)
    (sdist,) = (work / "sdist").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps"]
    # --ignore-installed: the editable installation of this environment has to stay.
    pip += ["--no-build-isolation", "--ignore-installed", "--prefix", str(work / "prefix")]
    _run(*pip, sdist, cwd=work)
    return work / "prefix"


@pytest.fixture(scope="module")
def metadata(pip_prefix: Path) -> PathDistribution:
    """What pip recorded of the package."""
    (folder,) = _site_packages(pip_prefix).glob("groot_int8_ros-*.dist-info")
    return PathDistribution(folder)


def test_pip_puts_commands_in_bin_although_setup_cfg_names_another_folder(
    pip_prefix: Path,
) -> None:
    assert _names(pip_prefix / "bin") == _COMMANDS
    assert not (pip_prefix / "lib" / "groot_int8_ros").exists()


def test_pip_installs_every_module_and_shared_file_through_the_sdist(
    pip_prefix: Path, sources: Path
) -> None:
    installed = _site_packages(pip_prefix)
    assert _modules(installed) == _modules(sources)
    assert (installed / "groot_int8_ros" / "py.typed").is_file()
    _assert_share_is_complete(pip_prefix, sources)


def test_pip_installed_command_runs_and_says_its_version(
    pip_prefix: Path, metadata: PathDistribution, tmp_path: Path
) -> None:
    path = str(_site_packages(pip_prefix))
    said = _run(pip_prefix / "bin" / "groot-int8", "--version", cwd=tmp_path, PYTHONPATH=path)
    assert said.strip() == metadata.version


def test_every_command_leads_to_a_function_that_is_there(
    pip_prefix: Path, metadata: PathDistribution, tmp_path: Path
) -> None:
    path = str(_site_packages(pip_prefix))
    for entry in metadata.entry_points.select(group="console_scripts"):
        if entry.name.endswith("_node"):
            pytest.importorskip("rclpy", reason="rclpy is not installed on this Python")
        code = f"import {entry.module} as m; assert callable(m.{entry.attr}); print(m.__file__)"
        loaded = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path)
        assert Path(loaded.strip()).is_relative_to(pip_prefix)


def test_package_xml_and_pip_metadata_give_one_version(
    metadata: PathDistribution, sources: Path
) -> None:
    manifest = ElementTree.parse(sources / "package.xml").getroot()
    assert manifest.findtext("version") == metadata.version
    assert manifest.findtext("name") == metadata.name
    assert manifest.findtext("license") == metadata.metadata["License"]


@pytest.mark.parametrize("options", [(), ("--symlink-install",)], ids=["copied", "linked"])
def test_colcon_build_gives_ros2_run_and_launch_what_they_look_for(
    sources: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    colcon = Path(sys.executable).with_name("colcon")
    if not colcon.is_file():
        pytest.skip("colcon is not installed beside this Python; `make setup` installs it")
    shutil.copytree(sources, tmp_path / "src" / "groot_int8_ros")
    _run(
        colcon,
        *("--log-base", "log", "build", *options),
        cwd=tmp_path,
        COLCON_HOME=str(tmp_path / ".colcon"),
        PYTHONWARNINGS="ignore",
    )
    prefix = tmp_path / "install" / "groot_int8_ros"
    commands = prefix / "lib" / "groot_int8_ros"
    assert _names(commands) == _COMMANDS
    assert all(os.access(commands / name, os.X_OK) for name in _COMMANDS)
    _assert_share_is_complete(prefix, sources)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = (
        f"source {tmp_path}/install/local_setup.bash && {commands}/groot-int8 --version && "
        f"{sys.executable} -c 'import offline_tools; print(offline_tools.__file__)' && "
        'echo "$AMENT_PREFIX_PATH"'
    )
    version, module, ament_prefix = _run(
        "bash", "-c", script, cwd=elsewhere, PYTHONPATH="", AMENT_PREFIX_PATH=""
    ).splitlines()
    assert version == ElementTree.parse(sources / "package.xml").getroot().findtext("version")
    assert Path(module).is_relative_to(tmp_path)
    assert str(prefix) in ament_prefix.split(":")


def _locked(sources: Path, python: str) -> dict[str, Version]:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    pins: dict[str, Version] = {}
    for line in (sources / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if not line or line.lstrip().startswith("#"):
            continue
        requirement = Requirement(line)
        assert requirement.url is None
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is locked twice for Python {python}"
            pins[name] = Version(specifier.version)
    return pins


@pytest.mark.parametrize("python", _LOCKED_PYTHONS)
def test_lock_is_not_older_than_the_requirements(
    metadata: PathDistribution, sources: Path, python: str
) -> None:
    pins = _locked(sources, python)
    # `tensorrt` is for the board, whose own versions count, and `compare` for one comparison.
    extras = ["", *re.findall(r"--extra (\w+)", (sources / "Makefile").read_text())]
    assert {"ros", "offline", "rtx", "dev"} <= set(extras)
    declared = [
        requirement
        for requirement in map(Requirement, metadata.requires or [])
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    assert len(declared) > len(extras)
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements.lock; run `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{name}; run `make lock`"


@pytest.mark.parametrize("python", _LOCKED_PYTHONS)
def test_lock_leaves_cuda_libraries_to_torch(sources: Path, python: str) -> None:
    # A pinned CUDA library would be downloaded, in gigabytes, beside a CPU build of torch too.
    cuda = re.compile(r"^(nvidia-|cuda-|triton$)")
    assert [name for name in _locked(sources, python) if cuda.match(name)] == []
