"""The example of the documentation trains on two processes, as it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks.pair import pair

ROOT = Path(__file__).parents[2]
EXAMPLE = "docs/examples/two_ranks.py"


def check(printed: str) -> None:
    found = re.fullmatch(r"accuracy (.*), epsilon (.*) at delta 1e-5\n", printed)
    assert found is not None, printed
    assert float(found[1]) > 0.9
    assert found[2] == "2.87"


def example(rank: int) -> str:
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        # This process has its group already, and keeps it.
        patch.setattr(dist, "init_process_group", lambda _: None)
        # The groups of models that earlier tests have freed end.
        end = dist.destroy_process_group
        patch.setattr(dist, "destroy_process_group", lambda *group: end(*group) if group else None)
        patch.setattr(sys, "argv", [EXAMPLE, "ddp"])
        runpy.run_path(str(ROOT / EXAMPLE))
    return printed.getvalue()


def test_the_example_trains_with_a_model_on_each_rank() -> None:
    printed, nothing = pair().run(example)
    check(printed)
    assert not nothing


def test_torchrun_trains_the_example_with_shards() -> None:
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {EXAMPLE} fsdp"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout)
