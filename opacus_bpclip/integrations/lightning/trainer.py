"""`PrivateTrainer`: Lightning's ``Trainer``, whose ``fit`` is differentially private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from opacus_bpclip.engine.engine import PrivacyEngine
from opacus_bpclip.integrations.arguments import PrivacyArguments
from opacus_bpclip.integrations.lightning.callback import SUFFIX, PrivateFit
from opacus_bpclip.integrations.lightning.refusals import refuse_options, refuse_strategy
from opacus_bpclip.integrations.lightning.replicas import Replicas
from opacus_bpclip.integrations.spending import Spending


class PrivateTrainer(Trainer):
    """Lightning's ``Trainer``, whose ``fit`` is differentially private.

    The training loader's ``batch_size`` is the expected size of a Poisson sample, on all processes
    together. One batch of the loop is one sample, one step, and one entry of the accountant.

    Guarantee: the model after each step, and so each checkpoint, is private with `epsilon` and
    ``target_delta``. What the module logs of the training data is not covered. See
    ``docs/lightning.md``.

    Args:
        privacy: the privacy of the run.
        max_grad_norm: the bound of each example's gradient, before the noise.
        max_physical_batch_size: the largest number of examples in memory at once, with automatic
            optimization; ``None`` for whole samples.
        criterion: the name of the module's attribute that computes the loss, for example
            ``"criterion"``. In training it is the private one that `make_private` returns. It is
            needed in bfloat16.
        **options: the options of ``Trainer``.

    Raises:
        ValueError: an option does not go with private training; the message says why, and what to
            do instead.

    Attributes:
        engine: the privacy engine, whose accountant has counted all steps.
    """

    def __init__(
        self,
        *,
        privacy: PrivacyArguments,
        max_grad_norm: float = 1.0,
        max_physical_batch_size: int | None = None,
        criterion: str | None = None,
        **options: Any,
    ) -> None:
        refuse_options(options)
        self.privacy = privacy
        self.max_grad_norm = max_grad_norm
        self.max_physical_batch_size = max_physical_batch_size
        self.criterion = criterion
        self.engine = PrivacyEngine(accountant=privacy.accountant, secure_mode=privacy.secure_mode)
        self._spending = Spending(
            self.engine.accountant, privacy.target_delta, privacy.target_epsilon
        )
        self._fit = PrivateFit(self)
        theirs = options.pop("callbacks", None) or []
        callbacks = [theirs] if isinstance(theirs, Callback) else theirs
        if options.get("strategy") == "ddp":
            options["strategy"] = Replicas()
        # Each process draws its part of each sample itself.
        options["use_distributed_sampler"] = False
        super().__init__(callbacks=[self._fit, *callbacks], **options)
        refuse_strategy(self)

    @property
    def epsilon(self) -> float:
        """Return the epsilon that the run has spent, at ``target_delta``."""
        return self._spending.epsilon

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        **kwargs: Any,
    ) -> None:
        """Train privately; the arguments are ``Trainer``'s.

        Args:
            model: the module.
            train_dataloaders: one loader, or a data module.
            val_dataloaders: the loaders of the validation.
            datamodule: a data module; Opacus's ``DPLightningDataModule`` is not needed.
            ckpt_path: a checkpoint to go on from. Its steps, and those of the run's other
                checkpoints beside it, count as spent.
            **kwargs: further arguments of ``Trainer.fit``.

        Raises:
            CoverageError: the model cannot be trained privately.
            ValueError: ``target_epsilon`` is spent, the checkpoint does not say what was spent, or
                another argument is wrong.
        """
        self._fit.begin()
        try:
            data, datamodule = _inside(train_dataloaders), _inside(datamodule)
            super().fit(model, data, val_dataloaders, datamodule, ckpt_path, **kwargs)
        finally:
            self._fit.end()

    def save_checkpoint(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, which says what was spent, and beside it a file that says so, too."""
        if self.is_global_zero and "://" not in str(filepath):
            self._spending.save(Path(filepath).with_suffix(SUFFIX))
        super().save_checkpoint(filepath, *args, **kwargs)


def _inside(data: Any) -> Any:
    """Return the data module inside of Opacus's, which is one of the package pytorch_lightning."""
    inside = getattr(data, "datamodule", None)
    return inside if isinstance(inside, LightningDataModule) else data
