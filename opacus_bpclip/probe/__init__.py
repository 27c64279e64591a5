"""Try a model out: do its examples keep apart, and how often is each layer used?"""

from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.coupling import Unusable, find_coupling
from opacus_bpclip.probe.prober import Prober, count_uses, with_uses

__all__ = [
    "EXAMPLES",
    "Batch",
    "Prober",
    "Unusable",
    "count_uses",
    "find_coupling",
    "with_uses",
]
