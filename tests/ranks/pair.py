"""Two processes that run functions of the tests on two ranks; they are started once and stay."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.living import LIVING

RANKS = 2
# Of a collective that nobody else comes to, and of a whole case.
_PATIENCE = timedelta(seconds=150)
_LIMIT = 60.0

Case = Callable[..., Any]


class Pair:
    """Two ranks of one process group."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Case, *args: Any) -> list[Any]:
        """Call a function of a module on both ranks; return what each returned.

        Args:
            case: called with the rank and ``args``.
            args: can be pickled.

        Raises:
            AssertionError: it raised on a rank, or did not end.
        """
        for pipe in self.pipes:
            pipe.send((case, args, tuple(LIVING)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(_LIMIT):
                self.end()
                raise AssertionError(f"rank {rank} hangs in {case.__name__}{args}")
            answers.append(pipe.recv())
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if failed:
            raise AssertionError("\n".join(failed))
        return [result for _, result in answers]

    def end(self) -> None:
        """End both processes; the next call of `pair` starts others."""
        pair.cache_clear()
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)  # it may be in the middle of something
            process.kill()
            process.join()
        self._folder.cleanup()


@functools.cache
def pair() -> Pair:
    """Return the two processes; the end of the test session ends them."""
    return Pair()


def end_pair() -> None:
    """End the two processes, if they were started: what they know of coverage is written then."""
    if pair.cache_info().currsize:
        pair().end()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=_PATIENCE
    )
    while True:
        try:
            case, args, patches = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(_LIMIT - 5)  # where it hangs
        try:
            torch.manual_seed(0)  # ranks that are seeded alike must not draw alike
            with pytest.MonkeyPatch.context() as monkeypatch:
                for patch in patches:
                    patch(monkeypatch)
                result = case(rank, *args)
            pipe.send(("", result))
        except Exception:
            pipe.send((traceback.format_exc(), None))
        finally:
            faulthandler.cancel_dump_traceback_later()
