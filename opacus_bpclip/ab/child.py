"""One arm in a process of its own, so that its peak memory is nobody else's."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection

from opacus_bpclip.ab.data import load
from opacus_bpclip.ab.errors import ArmError, JobError
from opacus_bpclip.ab.results import ArmResult, Plan
from opacus_bpclip.ab.settings import Settings


def train_arm_in_child(
    name: str, settings: Settings, plan: Plan, *, progress: bool = False
) -> ArmResult:
    """Train an arm as `training.train_arm` does, in a spawned process, and wait for it.

    Args:
        name: one of the settings' arms.
        settings: shared by all arms.
        plan: shared by all arms.
        progress: show a bar for each seed on stderr.

    Raises:
        ArmError: training failed or the process died; the text says which arm, and how.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_report_to, args=(sending, name, settings, plan, progress), daemon=True
    )
    process.start()
    # With our end open, the death of the child would leave us waiting for ever.
    sending.close()
    try:
        answer: ArmResult | str = receiving.recv()
        process.join()
    except EOFError:
        process.join()
        answer = _how_it_died(process.exitcode)
    finally:
        process.kill()
        receiving.close()
    if isinstance(answer, str):
        raise ArmError(f"the arm {name} failed: {answer}")
    return answer


def _report_to(
    connection: Connection, name: str, settings: Settings, plan: Plan, progress: bool
) -> None:
    # Ctrl-C reaches the whole process group; the parent answers it and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from opacus_bpclip.ab.training import train_arm

        data = load(settings.dataset, settings.data_root)
        connection.send(train_arm(name, settings, plan, data, progress=progress))
    except Exception as error:
        connection.send(_in_one_line(error))
    finally:
        connection.close()


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, JobError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (raised at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may be out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {exitcode} and no result"
