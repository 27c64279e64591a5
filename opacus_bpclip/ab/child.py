"""One arm in a process of its own, so that its peak memory is nobody else's."""

from __future__ import annotations

from opacus_bpclip.ab.data import load
from opacus_bpclip.ab.results import ArmResult, Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.child import call_in_child
from opacus_bpclip.jobs.errors import ArmError, ChildError


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
    try:
        return call_in_child(_train, name, settings, plan, progress)
    except ChildError as error:
        raise ArmError(f"the arm {name} failed: {error}") from error


def _train(name: str, settings: Settings, plan: Plan, progress: bool) -> ArmResult:
    from opacus_bpclip.ab.training import train_arm

    return train_arm(
        name, settings, plan, load(settings.dataset, settings.data_root), progress=progress
    )
