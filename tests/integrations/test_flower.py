"""Clients of Flower train privately: the example, message by message and in Flower's simulation."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="there is no Flower for Python 3.10")

from flwr.app import ArrayRecord, Context, Message, Metadata, RecordDict

from tests.integrations.plain import full_disk

EXAMPLE = Path(__file__).parents[2] / "docs/examples/flower_clients.py"
ROUND = [1.0, 0.1, 10]

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(EXAMPLE))


def reply_of(names: dict[str, Any], number: int = 0) -> RecordDict:
    """Return a client's reply to one round."""
    context = Context(1, number, {"partition-id": number}, RecordDict(), {})
    start = RecordDict({"arrays": ArrayRecord(torch.nn.Linear(20, 2).state_dict())})
    to_client = Metadata(
        run_id=1,
        message_id="",
        src_node_id=9,
        dst_node_id=number,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=60.0,
        message_type="train",
    )
    return names["train"](Message(start, metadata=to_client), context).content


def test_one_accountant_counts_the_rounds_of_each_client(names: dict[str, Any]) -> None:
    first, second, other = (reply_of(names, number) for number in (0, 0, 1))
    assert json.loads(Path("spent-0.json").read_text())["history"] == [[1.0, 0.1, 20]]
    assert json.loads(Path("spent-1.json").read_text())["history"] == [ROUND]
    spent = [reply["metrics"]["epsilon"] for reply in (first, second, other)]
    assert spent[0] == spent[2] < spent[1]


def test_the_steps_of_a_round_that_fails_count(names: dict[str, Any]) -> None:
    steps = 0

    def fails(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise RuntimeError("the third step was the last")
        return torch.nn.functional.cross_entropy(output, labels)

    names["train"].__globals__["cross_entropy"] = fails
    with pytest.raises(RuntimeError, match="the third step was the last"):
        reply_of(names)
    assert json.loads(Path("spent-0.json").read_text())["history"] == [[1.0, 0.1, 3]]


def test_a_write_that_fails_leaves_the_earlier_rounds(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reply_of(names)

    with full_disk(monkeypatch):
        reply_of(names)
    assert json.loads(Path("spent-0.json").read_text())["history"] == [ROUND]


def test_a_seed_does_not_make_the_noise_of_two_rounds_equal(names: dict[str, Any]) -> None:
    replies = []
    for _ in range(2):
        torch.manual_seed(0)
        replies.append(reply_of(names)["arrays"].to_torch_state_dict())
    assert not torch.equal(replies[0]["weight"], replies[1]["weight"])


@pytest.mark.slow  # the simulation starts processes
def test_flowers_simulation_runs_the_example(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Flower's simulation needs it")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for number in (0, 1):
        history = json.loads((tmp_path / f"spent-{number}.json").read_text())["history"]
        assert history == [[1.0, 0.1, 30]]
