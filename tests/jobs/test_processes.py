"""Work in processes of its own: what it returns, what it raises, and how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from rich.progress import Progress

from opacus_bpclip.jobs.errors import ChildError, UsageError
from opacus_bpclip.jobs.loading import load_object
from opacus_bpclip.jobs.processes import call_in_child, call_in_children, how_it_died
from opacus_bpclip.jobs.progress import progress_bar

# The children import only what is importable by name.
EVALUATE = eval


def test_results_and_the_environment_come_through():
    code = "__import__('os').environ['BPCLIP_TEST']"
    assert call_in_child(EVALUATE, code, environment={"BPCLIP_TEST": "7"}) == "7"
    assert "BPCLIP_TEST" not in os.environ


def test_several_calls_share_the_processes():
    calls = [(f"({number}, __import__('os').getpid())",) for number in range(6)]
    found = list(call_in_children(EVALUATE, calls, processes=2))
    assert sorted(number for number, _ in found) == list(range(6))
    assert os.getpid() not in {process for _, process in found}
    assert len({process for _, process in found}) <= 2


def test_an_error_is_one_line_that_says_where():
    with pytest.raises(ChildError, match=r"^ZeroDivisionError: division by zero \(raised at "):
        call_in_child(EVALUATE, "1 / 0")


def test_a_message_to_the_user_keeps_its_words_and_its_status():
    with pytest.raises(UsageError, match=r"^cannot load nowhere:a: No module"):
        call_in_child(load_object, "nowhere:a")


def test_a_process_that_dies_is_one_line():
    kill = "__import__('os').kill(__import__('os').getpid(), 9)"
    with pytest.raises(ChildError, match=r"ended by SIGKILL; the system may be out of memory$"):
        call_in_child(EVALUATE, kill)
    with pytest.raises(ChildError, match=r"ended with status 3 and no result$"):
        call_in_child(EVALUATE, "__import__('os')._exit(3)")


@pytest.mark.parametrize(
    ("exitcode", "text"),
    [
        (-9, "its process was ended by SIGKILL; the system may be out of memory"),
        (-11, "its process was ended by SIGSEGV"),
        (3, "its process ended with status 3 and no result"),
    ],
)
def test_how_a_process_died(exitcode, text):
    assert how_it_died(exitcode) == text


_SLEEP = """
import sys
from opacus_bpclip.jobs.loading import load_object
from opacus_bpclip.jobs.processes import call_in_child
if __name__ == "__main__":
    code = "(print(__import__('os').getpid(), flush=True), __import__('time').sleep(600))"
    try:
        call_in_child(eval, code)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_child_does_not_outlive_its_parent(sent, tmp_path):
    (tmp_path / "sleep.py").write_text(_SLEEP)
    command = [sys.executable, str(tmp_path / "sleep.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(sent)
        assert parent.wait(timeout=60) == (130 if sent == signal.SIGINT else -9)
    for _ in range(600):
        if not _runs(child):
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # One that nobody has waited for is there, and dead.
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().split()[2] != "Z"


def test_a_bar_goes_to_stderr_where_it_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr("opacus_bpclip.jobs.progress._INTERVAL", -1.0)
    drawn = []
    monkeypatch.setattr(Progress, "refresh", lambda self: drawn.append(self))
    for shown in (True, False):
        with progress_bar("flat, seed 0", 2, shown=shown) as bar:
            bar.advance()
            bar.tell(loss="0.5")
            bar.advance()
    assert len(drawn) >= 2
    assert capsys.readouterr().out == ""
