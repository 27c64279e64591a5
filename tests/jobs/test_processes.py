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


def test_several_calls_share_the_processes_and_the_environment():
    code = "({}, __import__('os').getpid(), __import__('os').environ['BPCLIP_TEST'])"
    calls = [(code.format(number),) for number in range(6)]
    environment = {"BPCLIP_TEST": "7"}
    found = list(call_in_children(EVALUATE, calls, processes=2, environment=environment))
    assert sorted(number for number, _, _ in found) == list(range(6))
    assert {variable for *_, variable in found} == {"7"}
    assert "BPCLIP_TEST" not in os.environ
    processes = {process for _, process, _ in found}
    assert os.getpid() not in processes
    assert len(processes) <= 2


@pytest.mark.parametrize(
    ("function", "text", "kind", "message"),
    [
        (EVALUATE, "1 / 0", ChildError, r"ZeroDivisionError: division by zero \(raised at \S+\)"),
        (load_object, "nowhere:a", UsageError, "cannot load nowhere:a: No module named 'nowhere'"),
        (
            EVALUATE,
            "__import__('os').kill(__import__('os').getpid(), 9)",
            ChildError,
            "its process was ended by SIGKILL; the system may be out of memory",
        ),
        (
            EVALUATE,
            "__import__('os')._exit(3)",
            ChildError,
            "its process ended with status 3 and no result",
        ),
    ],
    ids=["an error", "a message to the user", "a signal", "an exit"],
)
def test_a_failure_is_one_line(function, text, kind, message):
    with pytest.raises(kind, match=rf"^{message}$"):
        call_in_child(function, text)


def test_ctrl_c_does_not_reach_a_process_that_is_being_started():
    blocked = "__import__('signal').SIGINT in __import__('signal').pthread_sigmask(0, [])"
    assert call_in_child(EVALUATE, blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_crash_is_no_hint_at_the_memory():
    assert how_it_died(-signal.SIGSEGV) == "its process was ended by SIGSEGV"


# A shell may have had Ctrl-C ignored, which processes take over.
_SLEEP = """
import signal, sys
from opacus_bpclip.jobs.processes import call_in_child
signal.signal(signal.SIGINT, signal.default_int_handler)
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


@pytest.mark.parametrize("moment", ["cyclopts", "opacus_bpclip.inspection.command", "torch"])
def test_ctrl_c_during_an_import_is_one_line(moment):
    # What Ctrl-C does, in the moment in which a module begins to be imported.
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have ignored it
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from opacus_bpclip.__main__ import main\n"
        "sys.exit(main(['inspect', 'nowhere:a']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "opacus-bpclip: interrupted\n")


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
