"""Hazards of the documentation: a forgotten placeholder, a command that does not exist."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from offline_tools.bags.dds import LARGE_IMAGE_TRANSPORTS, TRANSPORTS_VARIABLE
from offline_tools.cli import SUBCOMMANDS

_PLACEHOLDER = re.compile(r"@[A-Z][A-Z0-9_]*@|\b(?:TODO|FIXME|XXX|TBD)\b")
# A command in code: at the start of a line, or behind a backtick or a prompt.
_COMMAND = re.compile(r"groot-int8 +([a-z][a-z-]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def _pages(repository_root: Path) -> list[Path]:
    return [repository_root / "README.md", *sorted((repository_root / "docs").rglob("*.md"))]


def _commands(text: str) -> list[tuple[str, list[str]]]:
    """Return each subcommand that a page names, with the options behind it."""
    joined = text.replace("\\\n", " ")
    found = []
    for match in _COMMAND.finditer(joined):
        behind = re.split(r"[`\n#]", joined[match.end() :], maxsplit=1)[0]
        found.append((match[1], _OPTION.findall(behind)))
    return found


def test_no_placeholder_is_left_in_the_documentation(repository_root: Path) -> None:
    pages = _pages(repository_root)
    assert len(pages) >= 3
    left = [
        f"{page.relative_to(repository_root)}:{number}: {match[0]}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        for match in _PLACEHOLDER.finditer(line)
    ]
    assert left == []


@pytest.mark.parametrize("text", ["see @MEASURED@ ms", "TODO: measure", "FIXME"])
def test_placeholders_are_found(text: str) -> None:
    assert _PLACEHOLDER.search(text)


def test_every_command_and_option_that_the_documentation_names_exists(
    repository_root: Path,
) -> None:
    wrong = []
    known: dict[str, set[str]] = {}
    for page in _pages(repository_root):
        for name, options in _commands(page.read_text(encoding="utf-8")):
            if name not in SUBCOMMANDS:
                wrong.append(f"{page.name}: groot-int8 {name}")
                continue
            if options and name not in known:
                known[name] = _options_of(name)
            wrong += [f"{page.name}: {name} {o}" for o in options if o not in known[name]]
    assert wrong == []


def test_the_readme_names_every_step_of_the_road(repository_root: Path) -> None:
    named = {name for name, _ in _commands((repository_root / "README.md").read_text())}
    # A pattern that found nothing would let any page pass.
    assert {"parity", "export", "verify", "build-check", "episode-to-bag", "play-bag"} <= named


def test_commands_are_read_with_the_options_of_continued_lines() -> None:
    text = "`groot-int8 exprot` and\n    groot-int8 export --bundle b \\\n    --force # --other\n"
    assert _commands(text) == [("exprot", []), ("export", ["--bundle", "--force"])]


def _options_of(name: str) -> set[str]:
    parser = argparse.ArgumentParser()
    module = SUBCOMMANDS[name][0]
    try:
        importlib.import_module(module).configure(parser)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                options |= set(nested._option_string_actions)
    return options


def test_transports_that_the_documentation_gives_are_those_of_the_tools(
    repository_root: Path,
) -> None:
    for name in ("README.md", "config/policy.yaml"):
        given = re.findall(
            rf'{TRANSPORTS_VARIABLE}="([^"]*)"', (repository_root / name).read_text("utf-8")
        )
        assert given, name
        assert set(given) == {LARGE_IMAGE_TRANSPORTS}, name
