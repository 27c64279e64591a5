"""Lightning's ``Trainer`` with private training."""

from opacus_bpclip.integrations.arguments import PrivacyArguments
from opacus_bpclip.integrations.lightning.trainer import PrivateTrainer

__all__ = ["PrivacyArguments", "PrivateTrainer"]
