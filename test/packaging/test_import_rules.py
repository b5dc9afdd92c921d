"""Who may import whom: the robot side free of torch, the policy free of ROS, one direction.

The rules are read from the source (an import inside a function counts too) and shown once more
where it matters, in a process that has imported the whole robot side.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement

_ROS_PACKAGE = re.compile(
    r"^(\w+_msgs|std_srvs|builtin_interfaces|rclpy|rcl_interfaces|cv_bridge|launch(_\w+)?|"
    r"ament_index_python|message_filters|diagnostic_updater|rosbag2_py|tf2_\w+)$"
)
_WORKSTATION = re.compile(r"^(offline_tools|torch|transformers)$")


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    base = module.split(".")[: None if is_package else -1]
    base = base[: len(base) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import in a file, also of those by a literal name."""
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, is_package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            function, name = node.func, node.args[0]
            called = getattr(function, "attr", getattr(function, "id", ""))
            if (
                called in {"import_module", "__import__"}
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                yield node.lineno, name.value


def _violations(root: Path, folder: str, forbidden: re.Pattern[str]) -> list[str]:
    files = sorted((root / folder).rglob("*.py"))
    assert files, f"no sources in {folder}"
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in files
        for line, name in _imports(path, root)
        if forbidden.match(name.split(".")[0])
    ]


def test_robot_side_imports_neither_torch_nor_the_workstation_side(repository_root: Path) -> None:
    assert _violations(repository_root, "groot_int8_ros", _WORKSTATION) == []


@pytest.mark.parametrize("folder", ["policy", "capture", "control"])
def test_policy_capture_and_control_import_no_ros(repository_root: Path, folder: str) -> None:
    assert _violations(repository_root, f"groot_int8_ros/{folder}", _ROS_PACKAGE) == []


@pytest.mark.parametrize(
    ("folder", "packages"),
    [("policy", "policy"), ("capture", "capture|policy"), ("control", "control")],
)
def test_policy_capture_and_control_import_nothing_of_the_ros_layer(
    repository_root: Path, folder: str, packages: str
) -> None:
    allowed = re.compile(rf"^groot_int8_ros\.({packages}|errors|__version__)\b")
    assert [
        f"{path.name}:{line} imports {name}"
        for path in sorted((repository_root / "groot_int8_ros" / folder).rglob("*.py"))
        for line, name in _imports(path, repository_root)
        if name.startswith("groot_int8_ros.") and not allowed.match(name)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.nn as nn",
        "from torch import nn",
        "def f():\n    import torch",
        "importlib.import_module('torch')",
        "from ..offline_tools import cli",
    ],
)
def test_the_reader_of_imports_sees_a_planted_one(tmp_path: Path, line: str) -> None:
    # Two dots lead out of `package/sub` to `package`, so the last case plants a folder of its own.
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "planted.py").write_text(line, encoding="utf-8")
    assert len(_violations(tmp_path, "sub", _WORKSTATION)) == 1


@functools.cache
def _third_party(root: Path, *folders: str) -> dict[str, str]:
    """Return the top-level modules that the folders import from elsewhere, with one place each."""
    own = {"groot_int8_ros", "offline_tools", *sys.stdlib_module_names}
    return {
        name.split(".")[0]: f"{path.relative_to(root)}:{line}"
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
        for line, name in _imports(path, root)
        if name.split(".")[0] not in own
    }


def test_every_ros_package_that_is_imported_is_declared_in_package_xml(
    repository_root: Path,
) -> None:
    manifest = ElementTree.parse(repository_root / "package.xml").getroot()
    declared = {element.text for element in manifest.iter("exec_depend")}
    used = _third_party(repository_root, "groot_int8_ros", "offline_tools", "launch")
    missing = {
        name: place
        for name, place in used.items()
        if _ROS_PACKAGE.match(name) and name not in declared
    }
    assert missing == {}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("groot_int8_ros", {"ros"}), ("offline_tools", {"ros", "offline", "rtx", "sim"})],
)
def test_every_library_that_is_imported_is_a_declared_requirement(
    repository_root: Path, folder: str, extras: set[str]
) -> None:
    provided: set[str] = set()
    for requirement in map(Requirement, requires("groot_int8_ros") or []):
        # As on the platform that has every wheel; elsewhere what is missing shows as a skip.
        environments = [{"extra": extra, "platform_machine": "x86_64"} for extra in {"", *extras}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            try:
                recorded = distribution(requirement.name).files or []
            except PackageNotFoundError:
                pytest.skip(
                    f"{requirement.name} is not installed; it may provide what is imported"
                )
            provided |= {file.parts[0].split(".")[0] for file in recorded}
    undeclared = {
        name: place
        for name, place in _third_party(repository_root, folder).items()
        # TensorRT comes with the robot's JetPack; cuda-python is for machines with a GPU alone;
        # ModelOpt comes with the extra `compare`, which the tests run without.
        if name not in provided | {"tensorrt", "cuda", "modelopt"} and not _ROS_PACKAGE.match(name)
    }
    assert undeclared == {}


_IMPORT_ALL = """
import importlib, json, pkgutil, re, sys
import groot_int8_ros

ros = re.compile(sys.argv[1])
done, without_ros = [], []
for module in pkgutil.walk_packages(groot_int8_ros.__path__, "groot_int8_ros."):
    try:
        importlib.import_module(module.name)
        done.append(module.name)
    except ModuleNotFoundError as error:
        if not ros.match((error.name or "").split(".")[0]):
            raise
        without_ros.append(module.name)
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers"})
print(json.dumps({"done": done, "without_ros": without_ros, "heavy": heavy}))
"""


def test_importing_the_whole_robot_side_loads_no_torch(repository_root: Path) -> None:
    # A library could pull torch in by itself; the sources alone cannot show that it does not.
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, _ROS_PACKAGE.pattern],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["heavy"] == []
    assert "groot_int8_ros.policy.policy" in report["done"]
    may_need_ros = re.compile(r"^groot_int8_ros\.(ros\b|\w+_node$)")
    assert [name for name in report["without_ros"] if not may_need_ros.match(name)] == []


def test_the_process_that_owns_commands_loads_no_policy_and_no_engine(
    repository_root: Path,
) -> None:
    pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
    heavy = re.compile(
        r"^(groot_int8_ros\.policy\.(policy|engines)|onnxruntime|tensorrt|tokenizers|cv2|PIL)\b"
    )
    code = "import json, sys; import groot_int8_ros.chunk_executor_node; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(sorted(sys.modules)))"],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [name for name in json.loads(done.stdout) if heavy.match(name)] == []


@pytest.mark.parametrize(
    "subcommand",
    [
        "build-check",
        "build",
        "audit",
        "gpu-proof",
        "calibrate",
        "calibration-data",
        "open-loop",
        "play-bag",
        "doctor",
        "measure-dds",
        "soak",
        "chunk-replay",
        "executor-params",
    ],
)
def test_steps_that_a_robot_needs_run_where_torch_is_missing(
    repository_root: Path, subcommand: str
) -> None:
    # None in sys.modules makes an import fail as it does where the package is not installed.
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        f"from offline_tools.cli import main; main(['{subcommand}', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"groot-int8 {subcommand}" in done.stdout
