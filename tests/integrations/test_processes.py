"""Each integration trains one model on two processes: one noise, one accountant's entry a step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "docs/examples/accelerate_loop.py"


def on_two_processes(script: Path, *arguments: str) -> str:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow  # each starts two processes
@pytest.mark.parametrize("script", ["trainer", "lightning"])
def test_two_processes_train_one_model(script: str, tmp_path: Path) -> None:
    printed = on_two_processes(Path(__file__).with_name(f"{script}_processes.py"), str(tmp_path))
    lines = re.findall(r"found ([^;]*);", printed)  # on one line, if both print at once
    assert len(lines) == 2, printed
    assert len(set(lines)) == 1
    # They take four steps more after their checkpoint, and four again.
    assert lines[0].startswith("[(1.0, 0.25, 12)]")


@pytest.mark.slow
def test_a_loop_of_accelerate_trains_one_model_on_two_processes() -> None:
    printed = on_two_processes(LOOP)
    lines = re.findall(r"accuracy 0\.9\d+, epsilon 2\.87 at delta 1e-5", printed)
    assert len(lines) == 2, printed
    assert len(set(lines)) == 1
