"""The commands of the pages parse, and what they name exists."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path

import pytest

from opacus_bpclip.__main__ import program
from tests.docs.pages import PAGES, ROOT, name_of, shell_lines


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's shell blocks, as words."""
    parts = [part for line in shell_lines(page) for part in line.split("&&")]
    # Settings of the environment before a command are not part of it.
    words = [shlex.split(re.sub(r"^\s*(\w+=\S+\s+)*", "", part), comments=True) for part in parts]
    return [each for each in words if each]


OWN = [
    pytest.param(words[1:], id=f"{name_of(page)}: {' '.join(words[1:])}")
    for page in PAGES
    for words in commands(page)
    if Path(words[0]).name == "opacus-bpclip"
]


@pytest.mark.parametrize("arguments", OWN)
def test_a_command_of_the_package_parses(arguments: list[str]) -> None:
    command, *_ = program().parse_args(arguments, exit_on_error=False, print_error=False)
    assert command.__name__ == arguments[0]


def test_there_are_commands_of_each_kind() -> None:
    assert {each.values[0][0] for each in OWN} == {"ab", "audit", "bench", "inspect"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_commands_run_is_there(page: Path) -> None:
    for words in commands(page):
        for word in words:
            if re.fullmatch(r"(tests|benchmarks|docs)/\S+", word):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_that_commands_install_exist(page: Path) -> None:
    extras = importlib.metadata.metadata("opacus-bpclip").get_all("Provides-Extra") or []
    for line in shell_lines(page):
        for extra in re.findall(r'-e "\.\[(\w+)\]"', line):
            assert extra in extras
