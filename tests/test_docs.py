"""The documents' code runs, and their links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from opacus_bpclip.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_example_of_a_rule_of_ones_own_passes_its_own_test():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/custom-layers.md").read_text(), re.S)
    names = {}
    before = dict(RULES)
    try:
        for block in code:
            exec(block, names)
        names["test_shift"]()
    finally:
        RULES.clear()
        RULES.update(before)
    assert issubclass(names["Shift"], torch.nn.Module)


def test_the_table_of_tightness_is_the_benchmarks(monkeypatch):
    spec = importlib.util.spec_from_file_location("tightness", ROOT / "benchmarks/tightness.py")
    tightness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tightness)
    monkeypatch.setattr(tightness, "EXAMPLES", 4)
    table = (ROOT / "docs/supported-layers.md").read_text()
    torch.manual_seed(0)
    for name, (layer, draws) in tightness.CASES.items():
        rule, ratio = tightness.tightness(layer, draws)
        assert f"| {name} | `{rule}` | " in table
        assert 0 < ratio["product"] <= 1 + 1e-9
        assert ratio["product"] <= ratio["weighted"] * (1 + 1e-9)
        assert ratio["weighted"] <= ratio["exact"] * (1 + 1e-9)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "mailto:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_exist(page):
    for file, test in re.findall(r"`(tests/\S+?\.py)::(\w+)", page.read_text()):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
