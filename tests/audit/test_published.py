"""The audit finds what went wrong in 2022, and the page that tells of it runs as it stands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from opacus_bpclip.__main__ import main
from opacus_bpclip.audit import audit
from opacus_bpclip.audit.published import PublishedTrainer
from opacus_bpclip.audit.results import AuditRecord

PAGE = Path(__file__).parents[2] / "docs/tutorials/2022.md"
COMMANDS = dict(
    zip(
        ("original", "original with noise", "repaired"),
        re.findall(r"^    (opacus-bpclip audit .+)$", PAGE.read_text(), re.M),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command of the page prints, and its verdict."""
    found = {}
    for name, command in COMMANDS.items():
        file = tmp_path_factory.mktemp("audits") / "a.json"
        page = file.with_suffix(".md")
        options = ["--processes", "1", "--no-progress", "--json", file, "--markdown", page]
        assert main([*shlex.split(command)[1:], *map(str, options)]) == 1
        (audited,) = AuditRecord.read(file).results
        found[name] = page.read_text(), audited.verdict
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tutorials_commands_fail_and_print_what_it_shows(name, told):
    text, _ = told[name]
    assert "VIOLATION in 1 of 1 targets" in text
    shown = re.search(
        rf"    {re.escape(COMMANDS[name])}\n.*?```\n(.*?)\n```", PAGE.read_text(), re.S
    )
    if COMMANDS[name].endswith("--trials 0"):
        assert shown is not None
        assert shown[1] in text


def test_the_original_fails_before_any_noise_is_drawn(told):
    _, verdict = told["original"]
    # The batch size, less the claim for a layer that does not move.
    assert verdict.neighbours.ratio == pytest.approx(64 / 2**0.5, rel=1e-3)
    assert verdict.replay.violations == ()


def test_the_originals_noise_is_as_it_says_and_its_epsilon_beyond_its_claim(told):
    _, verdict = told["original with noise"]
    assert all(law.violations == () for law in verdict.noise)
    (one, _) = verdict.empirical
    assert one.gap > 40
    assert (one.false_positives, one.false_negatives) == (0, 0)
    assert one.mu_lower > 3 * one.mu


def test_the_repaired_one_couples_the_examples(told):
    _, verdict = told["repaired"]
    assert 1.5 < verdict.neighbours.ratio < 2
    assert "batch" in verdict.neighbours.where


def test_clips_are_what_the_paper_says():
    torch.manual_seed(0)
    trainer = PublishedTrainer((8, 2), 1e-3, 3e-3, 0.0)
    x = torch.full((1, 8), 1e4)
    assert trainer.on((x, torch.tensor([1]))).norm() == pytest.approx(3.0 * 1e-3, rel=1e-3)
    assert not trainer.on((x[:0], torch.zeros(0, dtype=torch.long))).any()


def test_the_tutorials_own_training_code_passes():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    verdict = audit(names["my_target"](), trials=100, searches=10)
    assert (verdict.violations, verdict.outcome) == ((), "pass")
    assert verdict.neighbours.change > 0.99
