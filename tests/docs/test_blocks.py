"""The Python blocks of each page run, one after the other, as one script."""

from __future__ import annotations

import functools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import unregister
from opacus_bpclip.rules import RULES
from tests.docs.pages import PAGES, ROOT, languages, name_of, python

# What pages call yours: they do not make it themselves.
GIVEN = ("model", "optimizer", "loader")

# The blocks of these pages are parts of scripts, which run in tests of their own.
COMPARISON = "docs/examples/compare_clipping.py"
PARTS = {
    "docs/compare.md": (COMPARISON,),
    "docs/flower.md": ("docs/examples/flower_clients.py",),
    "docs/lightning.md": (
        "docs/examples/lightning_digits.py",
        "tests/integrations/test_lightning.py",
    ),
    "docs/many-devices.md": ("docs/examples/two_ranks.py",),
}

# The blocks of this page are given a model of transformers, in tests/integrations.
ELSEWHERE = ("docs/hugging-face.md",)

WITH_PYTHON = [page for page in PAGES if python(page) and name_of(page) not in (*PARTS, *ELSEWHERE)]


def given() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(512, 4), torch.randint(2, (512,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dict(zip(GIVEN, (model, optimizer, DataLoader(data, batch_size=16)), strict=True))


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = dict(RULES)
    monkeypatch.chdir(tmp_path)
    # The default backend compiles C++ for half a minute; what is compiled is the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    RULES.clear()
    RULES.update(before)
    unregister()


def run(page: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    names = given()
    for block in python(page):
        exec(compile(block, name_of(page), "exec"), names)
    return names


# Opacus says so of few steps, and peft calls what transformers has renamed: no matter of the pages.
@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_a_pages_blocks_run(page: Path) -> None:
    names = run(page)
    # What a page defines as a test is one.
    for test in [each for name, each in names.items() if name.startswith("test_")]:
        test()


@pytest.mark.parametrize("page", PARTS)
def test_parts_of_a_script_are_in_it(page: str) -> None:
    scripts = [unindented((ROOT / script).read_text()) for script in PARTS[page]]
    blocks = python(ROOT / page)
    assert blocks
    assert all(any(unindented(block) in script for script in scripts) for block in blocks)


def unindented(code: str) -> str:
    return re.sub(r"^ +", "", code, flags=re.MULTILINE)


def test_the_script_of_a_comparison_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / COMPARISON), run_name="__main__")
    printed = capsys.readouterr().out
    assert "flat cannot train this model: " in printed
    assert re.search(r"^best private run: backprop, seed [01], rmse \d\.\d{3}$", printed, re.M)


def test_the_five_lines_train_privately() -> None:
    names = run(ROOT / "README.md")
    model, optimizer, loader = (names[name] for name in GIVEN)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all((p != old).all() for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_of_languages_that_are_checked(page: Path) -> None:
    assert languages(page) <= {"python", "sh", "toml", ""}
