"""The public options of backpropagation clipping."""

from opacus_bpclip.config.checks import is_positive_number
from opacus_bpclip.config.clipping import (
    Allocation,
    BackpropClipping,
    Bound,
    LayerNoise,
    Propagate,
)
from opacus_bpclip.config.thresholds import AdaptiveThreshold, ThresholdSchedule
from opacus_bpclip.config.whitening import InputWhitening, PinkNoise, public_seed

__all__ = [
    "AdaptiveThreshold",
    "Allocation",
    "BackpropClipping",
    "Bound",
    "InputWhitening",
    "LayerNoise",
    "PinkNoise",
    "Propagate",
    "ThresholdSchedule",
    "is_positive_number",
    "public_seed",
]
