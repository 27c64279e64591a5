"""Links between files of the repository lead somewhere, and what pages name exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.docs.pages import PAGES, ROOT, name_of


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_documents_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "mailto:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page: Path):
    for file, test in re.findall(r"`(tests/\S+?\.py)::(\w+)", page.read_text()):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
