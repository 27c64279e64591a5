"""What went wrong in 2022 is convicted, and the page that tells it runs as it stands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from opacus_bpclip.__main__ import main
from opacus_bpclip.audit import audit
from opacus_bpclip.audit.published import PublishedTrainer, original, repaired

PAGE = Path(__file__).parents[2] / "docs/tutorials/2022.md"


def test_the_original_is_convicted_before_any_noise_is_drawn():
    verdict = audit(original(), trials=0)
    # The batch size, less the claim for a layer that does not move.
    factor = verdict.neighbours.change / verdict.neighbours.sensitivity
    assert factor == pytest.approx(64 / 2**0.5, rel=1e-3)
    assert verdict.replay.violations == ()


def test_the_originals_epsilon_is_beyond_its_claim():
    (one, _) = audit(original(), trials=500, searches=0).empirical
    assert one.gap > 40
    assert (one.false_positives, one.false_negatives) == (0, 0)
    assert one.mu_lower > 3 * one.mu


def test_the_noise_itself_is_what_the_original_says():
    assert all(law.violations == () for law in audit(original(), trials=100, searches=0).noise)


def test_the_repaired_one_couples_the_examples():
    verdict = audit(repaired(), trials=0)
    assert 1.5 < verdict.neighbours.change / verdict.neighbours.sensitivity < 2
    assert "batch" in verdict.neighbours.where


def test_clips_are_what_the_paper_says():
    torch.manual_seed(0)
    trainer = PublishedTrainer((8, 2), 1e-3, 3e-3, 0.0)
    x = torch.full((1, 8), 1e4)
    sum_of_one = trainer.on((x, torch.tensor([1])))
    assert sum_of_one is not None
    assert sum_of_one.norm() == pytest.approx(3.0 * 1e-3, rel=1e-3)
    empty = trainer.on((x[:0], torch.zeros(0, dtype=torch.long)))
    assert empty is not None
    assert not empty.any()


COMMANDS = re.findall(r"^    (opacus-bpclip audit .*)$", PAGE.read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tutorials_commands_convict_and_print_what_it_shows(command, capsys):
    arguments = shlex.split(command)[1:]
    assert main([*arguments, "--processes", "1", "--no-progress"]) == 1
    out = capsys.readouterr().out
    assert "VIOLATION in 1 of 1 targets" in out
    shown = re.search(rf"    {re.escape(command)}\n.*?```\n(.*?)\n```", PAGE.read_text(), re.S)
    if command.endswith("--trials 0"):
        assert shown is not None
        assert shown[1] in out


def test_the_tutorial_has_commands():
    assert len(COMMANDS) == 3


def test_the_tutorials_own_training_code_passes():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    verdict = audit(names["my_target"](), trials=100, searches=10)
    assert (verdict.violations, verdict.outcome) == ((), "pass")
    assert verdict.neighbours.change > 0.99
