"""Each integration trains one model on two processes: one noise, one accountant's entry a step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow  # each starts two processes
@pytest.mark.parametrize("script", ["trainer", "lightning", "accelerate"])
def test_two_processes_train_one_model(script: str) -> None:
    file = FOLDER / f"{script}_processes.py"
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {file}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"found ([^;]*);", done.stdout)  # on one line, if both print at once
    assert len(lines) == 2, done.stdout
    assert len(set(lines)) == 1
    assert lines[0].startswith("[(1.0, 0.25, 4)]")
