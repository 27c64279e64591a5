"""The pages, and what is in their code blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob(".github/**/*.md")),
]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Indented blocks hold formulas, too: a command is known by its program.
_COMMAND = re.compile(
    r"^    (?=(?:\w+=\S+ )*(?:\.venv/bin/)?"
    r"(?:opacus-bpclip|pytest|python3?|torchrun|benchmarks/)\b)"
    r"(?:.*\\\n)*.*\n",
    re.MULTILINE,
)


def name_of(page: Path) -> str:
    """Return a page's path from the repository's root."""
    return page.relative_to(ROOT).as_posix()


def languages(page: Path) -> set[str]:
    """Return the languages that fenced blocks name; empty for none."""
    return {block[1] for block in _FENCED.finditer(page.read_text())}


def python(page: Path) -> list[str]:
    """Return the Python blocks."""
    return [block[2] for block in _FENCED.finditer(page.read_text()) if block[1] == "python"]


def shell_lines(page: Path) -> list[str]:
    """Return the commands in shell blocks and indented ones, a line each."""
    text = page.read_text()
    fenced = [block[2] for block in _FENCED.finditer(text) if block[1] == "sh"]
    indented = _COMMAND.findall(_FENCED.sub("", text))
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]
