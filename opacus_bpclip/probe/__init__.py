"""Trial runs of a model: do its examples influence each other, and how often is each layer used?"""

from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.coupling import find_coupling, try_model
from opacus_bpclip.probe.leaves import batch_leaves, batch_size
from opacus_bpclip.probe.prober import Prober, count_uses, with_uses
from opacus_bpclip.probe.problems import Problem, UntriedError

__all__ = [
    "EXAMPLES",
    "Batch",
    "Prober",
    "Problem",
    "UntriedError",
    "batch_leaves",
    "batch_size",
    "count_uses",
    "find_coupling",
    "try_model",
    "with_uses",
]
