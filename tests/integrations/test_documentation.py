"""The code in the documentation of the integrations runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import peft
import pytest

from tests.integrations.tiny import Texts, arguments, bert

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore")
def test_the_page_about_hugging_face_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    names = {
        "model": peft.get_peft_model(bert(), config),
        "args": arguments(tmp_path, max_steps=2),
        "train_dataset": Texts(32, positions=False),
        "eval_dataset": Texts(8, positions=False),
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "hugging-face.md").read_text(), re.S)
    loop = (DOCS / "examples/accelerate_loop.py").read_text()
    own = [block for block in blocks if block not in loop]
    assert len(own) == len(blocks) - 1
    for block in own:
        exec(block, names)
    assert 7.9 < names["trainer"].epsilon <= 8.0
    assert (tmp_path / "adapter/privacy.json").exists()
    assert type(names["merged"]).__name__ == "BertForSequenceClassification"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("example", "accuracy", "epsilon"),
    [("trainer_adapters", 0.6, "2.99"), ("accelerate_loop", 0.9, "2.87")],
)
def test_an_example_learns(
    example: str, accuracy: float, epsilon: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(DOCS / f"examples/{example}.py"))
    found = re.search(r"accuracy (\S+), epsilon (\S+) at", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > accuracy
    assert found[2] == epsilon


@pytest.mark.parametrize("example", sorted((DOCS / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_has_less_than_60_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_lightning_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(DOCS / "examples/lightning_digits.py"))
    found = re.search(r"accuracy 0\.(\d+), epsilon (\S+) at", capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) > 60
    assert 2.9 < float(found[2]) <= 3.0
    assert names["trainer"].global_step == 30
