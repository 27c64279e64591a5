"""The code in the documentation of the integrations runs."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest

from tests.integrations.tiny import Texts, arguments, bert

PAGE = Path(__file__).parents[2] / "docs/hugging-face.md"


@pytest.mark.filterwarnings("ignore")
def test_the_page_about_hugging_face_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    names = {
        "model": peft.get_peft_model(bert(), config),
        "args": arguments(tmp_path, max_steps=2),
        "train_dataset": Texts(32),
        "eval_dataset": Texts(8),
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(block, names)
    assert 7.9 < names["trainer"].epsilon <= 8.0
    assert (tmp_path / "adapter/privacy.json").exists()
    assert type(names["merged"]).__name__ == "BertForSequenceClassification"
