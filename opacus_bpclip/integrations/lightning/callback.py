"""The callback that makes a fit private, ends it where its epsilon ends, and fills checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.integrations.lightning.model import model_of
from opacus_bpclip.integrations.lightning.parts import Samples, require_automatic, step_in_parts
from opacus_bpclip.integrations.lightning.replicas import replicated
from opacus_bpclip.integrations.spending import UNKNOWN_STEPS

SUFFIX = ".privacy.json"


class _Private(NamedTuple):
    """What `make_private` has returned for one call of ``fit``."""

    hooks: BackpropClipHooks
    module: LightningModule
    optimizer: Any
    criterion: Any  # the user's; ``None`` if none was named
    steps: int  # as many as are planned


class PrivateFit(Callback):
    """Makes each fit of a `PrivateTrainer` private.

    Args:
        trainer: the `PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._private: _Private | None = None
        self._restored = False

    def begin(self) -> None:
        """Expect a fit."""
        self._restored = False
        self.trainer._spending.forget_end()

    def end(self) -> None:
        """Leave module, optimizers and loader as they were before the fit."""
        if self._private is None:
            return
        self._private.hooks.cleanup()
        module = self._private.module
        if self._private.criterion is not None:
            setattr(module, self.trainer.criterion, self._private.criterion)
        vars(module).pop("training_step", None)
        self.trainer.optimizers = [self._private.optimizer.original_optimizer]
        self._private = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make module, optimizer and loader private.

        Raises:
            CoverageError: the model cannot be trained privately.
            ValueError: another argument is wrong.
        """
        if trainer.ckpt_path is not None and not self._restored:
            raise ValueError(
                f"The checkpoint {trainer.ckpt_path} does not say what was spent, {UNKNOWN_STEPS}"
                "load its weights into the module, and call fit without ckpt_path."
            )
        self._private = self._make_private(trainer, pl_module)
        self.trainer._spending.require_left(*self._next_steps())

    def on_train_batch_start(self, *_: Any) -> None:
        """Raise if Lightning goes on after the last step that fits the target."""
        self.trainer._spending.require_left(*self._next_steps())

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop after the last step that fits the target."""
        if self.trainer._spending.is_spent(*self._next_steps()):
            self.trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epsilon that is spent."""
        pl_module.log("epsilon", self.trainer.epsilon)

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent; Lightning puts it into each checkpoint."""
        state: dict[str, Any] = self.trainer._spending.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was spent, the steps of the run's other checkpoints included."""
        folder = Path(str(self.trainer.ckpt_path)).parent
        self.trainer._spending.take_over(state_dict, folder.glob(f"*{SUFFIX}"))
        self._restored = True

    def _next_steps(self) -> tuple[float, float, int]:
        assert self._private is not None
        optimizer = self._private.optimizer
        return optimizer.noise_multiplier, optimizer.step_hook.sample_rate, self._private.steps

    def _make_private(self, trainer: Trainer, module: LightningModule) -> _Private:
        rows = self.trainer.max_physical_batch_size
        if rows is not None:
            require_automatic(module)
        loader, planned = _loader_of(trainer), _planned(trainer)
        criterion = self.trainer.criterion and getattr(module, self.trainer.criterion)
        private = self.trainer.privacy
        theirs = loader.generator
        loader.generator, noise = private.generators(module.device)
        try:
            made = self.trainer.engine.make_private(
                module=replicated(model_of(module.train()), trainer.world_size),
                optimizer=_only(trainer.optimizers),
                criterion=criterion,
                data_loader=loader,
                noise_multiplier=private.noise_for(1 / len(loader), planned),
                max_grad_norm=self.trainer.max_grad_norm,
                clipping="backprop",
                backprop=private.backprop,
                noise_generator=None if private.secure_mode else noise,
                wrap_model=False,
            )
        finally:
            loader.generator = theirs
        hooks, optimizer, samples = made[0], made[1], Samples(made[-1])
        trainer.optimizers = [optimizer]
        if criterion is not None:
            setattr(module, self.trainer.criterion, made[2])
        if rows is not None:
            samples.loader.in_parts(rows)
            step_in_parts(module, optimizer, samples)
        # As Lightning attaches a loader that was passed to `fit`.
        trainer.fit_loop._data_source.instance = samples
        trainer.fit_loop._combined_loader = None
        return _Private(hooks, module, optimizer, criterion, planned)


def _loader_of(trainer: Trainer) -> DataLoader[Any]:
    trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):
        return loader
    raise ValueError(
        f"Expected one training data loader, not {type(loader).__name__}: the accountant counts "
        "each step as one Poisson sample of one data set. Pass one torch.utils.data.DataLoader, "
        "over a data set that holds all items."
    )


def _planned(trainer: Trainer) -> int:
    """Return the number of steps that a whole run takes."""
    planned = trainer.estimated_stepping_batches
    if math.isinf(planned):
        raise ValueError("The number of steps has no end. Pass max_epochs or max_steps.")
    return int(planned)


def _only(optimizers: list[Optimizer]) -> Optimizer:
    if len(optimizers) == 1:
        return optimizers[0]
    raise ValueError(
        f"configure_optimizers has returned {len(optimizers)} optimizers. Each would draw its own "
        "noise for its own step. Return one: opacus_bpclip.SeveralOptimizers(one, other) steps "
        "several."
    )
