"""Replacements of layers that cannot be trained privately."""

from opacus_bpclip.replacements.copying import compatible_copy
from opacus_bpclip.replacements.kinds import replacer_of
from opacus_bpclip.replacements.normalization import mixes_examples

__all__ = ["compatible_copy", "mixes_examples", "replacer_of"]
