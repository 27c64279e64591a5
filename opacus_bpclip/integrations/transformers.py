"""`PrivateTrainer`: Hugging Face's ``Trainer`` with private training.

The loop stays the library's. One of its steps is one logical batch, a Poisson sample; the trainer
runs its physical batches one after the other.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from opacus_bpclip.engine.engine import PrivacyEngine
from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.integrations.arguments import PrivacyArguments
from opacus_bpclip.integrations.ledger import FILE, Ledger, read
from opacus_bpclip.integrations.losses import loss_of, without_labels
from opacus_bpclip.integrations.refusals import OVERRIDDEN_LOSS, refuse
from opacus_bpclip.integrations.spending import Spending
from opacus_bpclip.integrations.stopping import StopAtTarget
from opacus_bpclip.losses.criterion import BackpropClipCriterion
from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.sampling.items import like
from opacus_bpclip.sampling.loader import PrivateDataLoader

__all__ = ["PrivacyArguments", "PrivateTrainer"]


class _Private(NamedTuple):
    """What `make_private` has returned for one call of ``train``."""

    wrapped: nn.Module
    hooks: BackpropClipHooks
    optimizer: BackpropClipOptimizer
    criterion: BackpropClipCriterion
    loader: PrivateDataLoader
    steps: int  # as many as are planned


class PrivateTrainer(Trainer):
    """Hugging Face's ``Trainer``, whose ``train`` is differentially private.

    Three of the training arguments mean what they mean in private training:

    - ``max_grad_norm`` bounds each example's gradient, before the noise; the batch's gradient is
      not clipped again.
    - The expected batch size is ``per_device_train_batch_size`` times
      ``gradient_accumulation_steps`` times the number of processes. Batches are Poisson samples.
    - ``per_device_train_batch_size`` is the largest number of examples that the model sees at
      once.

    The loss is ``compute_loss_func``, or that of the model's task, with one term for each example.
    Evaluation and prediction are ``Trainer``'s own.

    Guarantee: the model after each step, and so each checkpoint, is private with `epsilon` and
    ``target_delta``. What ``Trainer`` logs of the training data (the loss, counts of tokens) is
    not covered. See ``docs/hugging-face.md``.

    Args:
        *args: the arguments of ``Trainer``.
        privacy: the privacy of the run.
        **kwargs: the arguments of ``Trainer``.

    Raises:
        ValueError: an argument does not go with private training; the message says why, and what
            to do instead.

    Attributes:
        privacy: the privacy of the run.
        engine: the privacy engine, whose accountant has counted all steps.
    """

    args: Any

    def __init__(self, *args: Any, privacy: PrivacyArguments, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self)
        self.privacy = privacy
        self.engine = PrivacyEngine(accountant=privacy.accountant, secure_mode=privacy.secure_mode)
        self._spending = Spending(
            self.engine.accountant, privacy.target_delta, privacy.target_epsilon
        )
        self._ledger = Ledger(self._spending)
        self._private: _Private | None = None
        self._resumed: TrainerState | None = None
        self._has_loss = False
        self._batches: Iterator[Any] = iter(())
        self._generators = privacy.generators(self.args.device)
        self._logical_batch = (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        # Each pass of the library's loop is one logical batch. There is nothing to skip after a
        # checkpoint: each sample is drawn independently of all others.
        self.args = copy.copy(self.args)
        self.args.gradient_accumulation_steps = 1
        self.args.ignore_data_skip = True
        self._stopping = StopAtTarget(self)
        self.add_callback(self._stopping)

    @property
    def epsilon(self) -> float:
        """Return the epsilon that the run has spent, at ``target_delta``."""
        return self._spending.epsilon

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train privately; arguments and results are ``Trainer``'s.

        Args:
            resume_from_checkpoint: the folder of a checkpoint that a `PrivateTrainer` has saved,
                or ``True`` for the latest one. Its steps, and those of the run's other
                branches, count as spent.
            *args: further arguments of ``Trainer.train``.
            **kwargs: further arguments of ``Trainer.train``.

        Raises:
            CoverageError: the model cannot be trained privately.
            ValueError: ``target_epsilon`` is spent, the checkpoint does not say what was spent, or
                another argument is wrong.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        self._spending.begin()
        self._resumed = None
        self._ledger.include(self.args.output_dir)
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._ledger.restore(read(resume_from_checkpoint), resume_from_checkpoint)
            state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
            self._resumed = TrainerState.load_from_json(str(state))
        self._spending.agree(lambda spent: broadcast_object_list([spent])[0])
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.args.should_save:
                self._ledger.write()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it what was spent on it."""
        if self.args.should_save:
            self._ledger.write(Path(output_dir or self.args.output_dir) / FILE)
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what ``Trainer`` logs, and with a training loss the epsilon that is spent."""
        if "loss" in logs or "train_loss" in logs:
            logs["epsilon"] = self.epsilon
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the private loader while training, otherwise ``Trainer``'s own."""
        if self._private is None:
            return super().get_train_dataloader()
        return self._private.loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the expected size of a logical batch, on all processes together."""
        return self._logical_batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return a logical batch's first physical batch; `training_step` draws the others.

        The number of labels is not counted: it is private.
        """
        self._batches = epoch_iterator
        return [next(epoch_iterator)], None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the forward and backward passes of a logical batch; return its mean loss."""
        assert self._private is not None
        self._stopping.require_left()
        optimizer = self._private.optimizer
        total, rows = self._pass(model, inputs)
        while optimizer._check_skip_next_step(pop_next=False):
            optimizer.step()  # It only collects: more physical batches follow.
            optimizer.zero_grad()
            more, count = self._pass(model, next(self._batches))
            total, rows = total + more, rows + count
        return total / max(rows, 1)

    def _pass(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Run a physical batch; return the sum of its losses and the number of its examples.

        Not every model runs on an empty batch. The step adds the noise without it, too.
        """
        rows = len(inputs["labels"])
        if not rows:
            return torch.zeros((), device=self.args.device), 0
        self._has_loss = False
        try:
            return super().training_step(model, inputs) * rows, rows
        except PrivacyViolationError as error:
            if self._has_loss:
                raise
            raise ValueError(OVERRIDDEN_LOSS.format(type(self).__name__)) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss: in training the private criterion's, otherwise ``Trainer``'s own.

        The model does not get the labels in training, so that its own loss is not computed.
        """
        if self._private is None or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._has_loss = True
        inputs, labels = without_labels(self.model, inputs)
        outputs = model(**inputs)
        loss = self._private.criterion(outputs, labels)
        return (loss, outputs) if return_outputs else loss

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        loader = self._plain_loader()
        planned = self.args.max_steps
        if planned <= 0:
            planned = math.ceil(self.args.num_train_epochs * len(loader))
        if self._resumed is not None and self._resumed.global_step >= planned:
            # The library's loop would begin the epoch in which a plan ends, and take a step.
            self.state = self._resumed
            return TrainOutput(self.state.global_step, 0.0, {})
        self._private = self._make_private(loader, planned)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._private.hooks.cleanup()
            # The next call of `train` begins with the optimizer that this one has wrapped.
            self.optimizer = self._private.optimizer.original_optimizer
            self._private = None

    def _make_private(self, loader: DataLoader[Any], planned: int) -> _Private:
        self.privacy.warn_of_delta(loader.dataset)
        taken = self._resumed.global_step if self._resumed else 0
        wrapped = self.model.train()  # as each of the library's steps does
        if self.args.world_size > 1:
            wrapped = DifferentiallyPrivateDistributedDataParallel(self.model)
        criterion = self.compute_loss_func or loss_of(
            self.model, label_smoothing=self.args.label_smoothing_factor
        )
        hooks, optimizer, criterion, private = self.engine.make_private(
            module=wrapped,
            optimizer=self.create_optimizer(),
            criterion=criterion,
            data_loader=loader,
            noise_multiplier=self._spending.noise_for(
                self.privacy, 1 / len(loader), planned - taken
            ),
            max_grad_norm=self.args.max_grad_norm,
            clipping="backprop",
            backprop=self.privacy.backprop,
            noise_generator=None if self.privacy.secure_mode else self._generators[1],
            wrap_model=False,
        )
        self.optimizer = optimizer
        private.in_parts(self.args.per_device_train_batch_size)
        return _Private(wrapped, hooks, optimizer, criterion, private, planned)

    def _plain_loader(self) -> DataLoader[Any]:
        """Return a loader of logical batches with the library's collate function and workers."""
        theirs = super().get_train_dataloader()
        return like(
            theirs,
            theirs.dataset,
            batch_size=self._logical_batch,
            generator=self._generators[0],
        )

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any) -> nn.Module:
        """Return the model as training calls it: with several processes, in Opacus's wrapper."""
        if not training or self._private is None or self._private.wrapped is self.model:
            return super()._wrap_model(model, training, *args)
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # mixed precision alone
        return self._private.wrapped

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: each example's gradient was clipped before the noise."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return ``None``: without noise, the norm is private."""
