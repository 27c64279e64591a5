"""The callback that makes a fit private, ends it where its epsilon ends, and fills checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.integrations.ledger import UNKNOWN_STEPS
from opacus_bpclip.integrations.lightning.model import model_of
from opacus_bpclip.integrations.lightning.parts import Samples, in_parts, require_automatic
from opacus_bpclip.integrations.lightning.refusals import refuse_iterator, refuse_no_steps
from opacus_bpclip.integrations.lightning.replicas import replicated
from opacus_bpclip.integrations.lightning.steps import TrainingStep, before_each_step
from opacus_bpclip.model.input_clipping import clip_inputs


class _Private(NamedTuple):
    """What `make_private` has returned for one call of ``fit``."""

    hooks: BackpropClipHooks
    module: LightningModule
    optimizer: Any
    criterion: Any  # the user's; ``None`` if none was named
    steps: int  # as many as are planned
    # Makes a step for a whole sample of one for a part; ``None`` if samples have no parts.
    whole: Callable[[TrainingStep], TrainingStep] | None


class PrivateFit(Callback):
    """Makes each fit of a `PrivateTrainer` private.

    Args:
        trainer: the `PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._private: _Private | None = None
        self._restored = False
        self._taken = 0  # of the planned steps
        # What the private optimizer's state has beside the plain one's, after the fit.
        self._beside: dict[str, Any] = {}

    def begin(self) -> None:
        """Expect a fit."""
        self._restored, self._taken, self._beside = False, 0, {}
        self.trainer._spending.begin()

    def end(self) -> None:
        """Leave module, optimizers and loader as they were before the fit."""
        if self._private is None:
            return
        self._private.hooks.cleanup()
        module = self._private.module
        if self._private.criterion is not None:
            setattr(module, self.trainer.criterion, self._private.criterion)
        optimizer = self._private.optimizer
        plain = optimizer.original_optimizer
        state = optimizer.state_dict()
        self._beside = {name: state[name] for name in state.keys() - plain.state_dict().keys()}
        self.trainer.optimizers = [plain]
        self._private = None

    def private_step(self, step: TrainingStep) -> TrainingStep:
        """Return what to run as ``training_step``, for `only_private_steps`.

        Raises:
            PrivacyViolationError: the private optimizer is not what steps.
        """
        private = self._private
        if private is None or list(map(id, self.trainer.optimizers)) != [id(private.optimizer)]:
            raise PrivacyViolationError(
                "training_step was called where the private optimizer is not the trainer's only "
                "one: the step would have no clipping and no noise, and would not be counted. A "
                "callback trains by itself, or has replaced trainer.optimizers or "
                "trainer.callbacks. Leave it out."
            )
        return step if private.whole is None else private.whole(step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clip the inputs before Lightning loads weights that were trained with clipped inputs."""
        backprop = self.trainer.privacy.backprop
        if stage != TrainerFn.FITTING or backprop is None or backprop.max_input_norm is None:
            return
        # A module without parameters makes them later: in its own `setup`, or `configure_model`.
        if any(True for _ in pl_module.parameters()):
            clip_inputs(model_of(pl_module), backprop.max_input_norm)

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
        refuse_no_steps(trainer)
        refuse_iterator(pl_module)
        self.trainer._spending.agree(trainer.strategy.broadcast)
        self._private = self._make_private(trainer, pl_module)
        before_each_step(self._private.optimizer, self._require_left)
        if self._taken < self._private.steps:
            self._require_left()

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

    def on_save_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        """Save thresholds and settings after the fit, too, when the plain optimizer is back."""
        for state in checkpoint["optimizer_states"]:
            state.update(self._beside)

    def on_load_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        """Note how many of the planned steps have been taken."""
        self._taken = checkpoint["global_step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was spent, the steps of the run's other branches included."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return  # Only a fit goes on with the run: a test on its checkpoint spends nothing.
        self.trainer._ledger.restore(state_dict, str(self.trainer.ckpt_path))
        self._restored = True

    def _require_left(self) -> None:
        self.trainer._spending.require_left(*self._next_steps())

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
        private.warn_of_delta(loader.dataset)
        theirs = loader.generator
        loader.generator, noise = private.generators(module.device)
        try:
            made = self.trainer.engine.make_private(
                module=replicated(model_of(module), trainer.world_size),
                optimizer=_only(trainer.optimizers),
                criterion=criterion,
                data_loader=loader,
                noise_multiplier=self.trainer._spending.noise_for(
                    private, 1 / len(loader), planned - self._taken
                ),
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
        whole = None
        if rows is not None:
            samples.loader.in_parts(rows)
            whole = partial(in_parts, module=module, optimizer=optimizer, samples=samples)
        # As Lightning attaches a loader that was passed to `fit`.
        trainer.fit_loop._data_source.instance = samples
        trainer.fit_loop._combined_loader = None
        return _Private(hooks, module, optimizer, criterion, planned, whole)


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
