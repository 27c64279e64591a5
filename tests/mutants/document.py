"""Write the list of mutants and their killers: ``python -m tests.mutants.document``."""

from __future__ import annotations

import inspect
from itertools import groupby
from pathlib import Path

from tests.mutants import MUTANTS, Mutant
from tests.mutants.registry import example_of

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"

HEAD = """\
# Mutants

A test that cannot fail proves nothing. So the suite keeps a list of mutants, each of which makes
the code wrong in one way. A mutant is patched into the real code, and then a check of the property
that it breaks must fail. The same check must pass on the unchanged code. `tests/test_mutants.py`
does this for all of them.

This page is generated. After a change in `tests/mutants/`, run

    python -m tests.mutants.document
"""


def render() -> str:
    """Return the page."""
    parts = [HEAD]
    for module, mutants in groupby(MUTANTS, key=lambda m: inspect.getmodule(m.patch)):
        assert module is not None
        parts += [f"\n## {str(module.__doc__).strip().rstrip('.')}\n\n", _table(list(mutants))]
    return "".join(parts)


def _table(mutants: list[Mutant]) -> str:
    rows = ["| mutant | what is wrong | killed by |\n", "|---|---|---|\n"]
    for _, entries in groupby(mutants, key=lambda m: m.patch):
        same = list(entries)
        killers = "; ".join(dict.fromkeys(_killer(m) for m in same))
        rows.append(f"| `{same[0].name}` | {same[0].wrong} | {killers} |\n")
    return "".join(rows)


def _killer(mutant: Mutant) -> str:
    return f"`{mutant.killer.__name__}`: {example_of(mutant.killer).rstrip('.')}"


if __name__ == "__main__":
    PAGE.write_text(render())
