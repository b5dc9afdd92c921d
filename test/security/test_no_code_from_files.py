"""Hazards of code that comes out of a file: no reader of this package runs what it reads.

A list of what may not be called, held against every source file. What reads files safely is tried
in `test_malformed_files`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("groot_int8_ros", "offline_tools", "launch", "deploy")
# They run code when they read.
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.hub.load"),
    *("runpy.run_path", "runpy.run_module", "pandas.read_pickle"),
}
# Keyword that a call must have, and its value.
REQUIRED: dict[str, tuple[str, bool] | None] = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
    "np.fromfile": None,
    "yaml.load": None,
}
# The one place that may: its loader is PyYAML's safe one with more refusals.
YAML_READER = "groot_int8_ros/policy/files.py"
# Modules named by a table of ours, or by a parameter that `message_class` has checked.
IMPORTERS = {
    "groot_int8_ros/policy/engines/cuda.py",
    "groot_int8_ros/policy/engines/tensorrt_engine.py",
    "groot_int8_ros/ros/field_map.py",
    "offline_tools/benchmark/memory.py",
    "offline_tools/cli.py",
    "offline_tools/engine/library.py",
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _keyword(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def _faults(source: str, where: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        at = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            yield from (
                f"{at} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES
            )
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        if called in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
            yield f"{at} calls {called}"
        if called.endswith("import_module") and where not in IMPORTERS:
            yield f"{at} imports a module by a name that it computes"
        if _keyword(node, "shell") is True:
            yield f"{at} runs a shell"
        if called == "yaml.load" and where == YAML_READER:
            continue
        if called in REQUIRED:
            wanted = REQUIRED[called]
            if wanted is None or _keyword(node, wanted[0]) is not wanted[1]:
                yield f"{at} calls {called} without what makes it safe"


def test_no_source_file_can_run_what_it_reads(repository_root: Path) -> None:
    faults: list[str] = []
    seen = 0
    for folder in FOLDERS:
        for path in sorted((repository_root / folder).rglob("*.py")):
            seen += 1
            where = path.relative_to(repository_root).as_posix()
            faults += _faults(path.read_text(encoding="utf-8"), where)
    assert seen > 100
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "yaml.load(text, Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
        "os.system(text)",
    ],
)
def test_the_list_is_held_against_the_source(source: str) -> None:
    assert list(_faults(source, "groot_int8_ros/x.py"))


def test_the_yaml_reader_is_pyyamls_safe_one() -> None:
    yaml = pytest.importorskip("yaml")
    from groot_int8_ros.policy import files

    assert issubclass(files._PlainLoader, yaml.SafeLoader)
    assert files._PlainLoader.yaml_constructors == yaml.SafeLoader.yaml_constructors
