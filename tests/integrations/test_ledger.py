"""The files that say what a run has spent are found by each resume, and never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opacus_bpclip.integrations import ledger as files
from opacus_bpclip.integrations.ledger import FOLDER, Ledger
from opacus_bpclip.integrations.spending import Spending
from tests.integrations.plain import full_disk
from tests.integrations.test_spending import spending


def branch(saved: dict[str, Any], checkpoint: Path, root: Path) -> Spending:
    """Take one step more after a checkpoint, and write the ledger under a root."""
    run = spending()
    run.begin()
    kept = Ledger(run)
    kept.include(root)
    kept.restore(saved, checkpoint)
    run.accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    kept.write()
    return run


def test_branches_in_other_folders_find_each_other(tmp_path: Path) -> None:
    saved, checkpoint = spending(7).state(), tmp_path / "runs/a/x.ckpt"
    for taken in (8, 9, 10):
        assert branch(saved, checkpoint, tmp_path).steps == taken
    # From another root, by the folders around the checkpoint.
    for taken, root in ((11, "b"), (12, "c")):
        assert branch(saved, checkpoint, tmp_path / root).steps == taken


def test_a_ledger_that_may_not_be_written_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, checkpoint = tmp_path / "theirs", tmp_path / "theirs/x.ckpt"
    saved = spending(7).state()
    branch(saved, checkpoint, theirs)
    before = sorted(theirs.rglob("*"))
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    for taken in (9, 10):
        assert branch(saved, checkpoint, tmp_path / "ours").steps == taken
    assert sorted(theirs.rglob("*")) == before


def test_a_checkpoint_outside_of_the_root_has_a_ledger_beside_it(tmp_path: Path) -> None:
    run, checkpoint = spending(7), tmp_path / "elsewhere/x.ckpt"
    kept = Ledger(run)
    kept.include(tmp_path / "root")
    saved = run.state()
    kept.cover(checkpoint)
    run.accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    kept.write()
    assert branch(saved, checkpoint, tmp_path / "other").steps == 9


def test_other_runs_in_the_folder_do_not_count(tmp_path: Path) -> None:
    other = Ledger(spending(99))
    other.include(tmp_path)
    other.write()
    assert branch(spending(7).state(), tmp_path / "x.ckpt", tmp_path).steps == 8


def test_a_run_that_has_spent_nothing_leaves_no_file(tmp_path: Path) -> None:
    kept = Ledger(spending())
    kept.include(tmp_path)
    kept.write()
    assert not (tmp_path / FOLDER).exists()


def test_remote_storage_makes_no_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Ledger(spending(7))
    kept.include("s3://bucket")
    kept.cover("memory://x.ckpt")
    kept.restore(spending(7).state(), "s3://bucket/x.ckpt")
    kept.write()
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    files.write(path, {"history": [[1.0, 0.01, 7]]})

    with full_disk(monkeypatch):
        files.write(path, {"history": [[1.0, 0.01, 8]]})
    assert json.loads(path.read_text()) == {"history": [[1.0, 0.01, 7]]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_without_a_history_is_refused(tmp_path: Path) -> None:
    text = r"has no privacy.json, so the steps .* load it with from_pretrained, and train without"
    with pytest.raises(ValueError, match=text):
        files.read(tmp_path)
