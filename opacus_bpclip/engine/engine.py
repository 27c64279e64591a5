"""``make_private(..., clipping="backprop")``: Opacus's engine, with one clipping method more."""

from __future__ import annotations

from typing import Any

import opacus
import torch
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine import extensions
from opacus_bpclip.engine.compatibility import require_compatible
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.optimizer import fingerprint
from opacus_bpclip.optimizer.wrapper import OptimizerWrapper
from opacus_bpclip.replacements import compatible_copy


class PrivacyEngine(opacus.PrivacyEngine):
    """Opacus's engine, with one clipping method more.

    ``make_private`` and ``make_private_with_epsilon`` accept ``clipping="backprop"`` and
    ``backprop=BackpropClipping(...)``; every other call is Opacus's own.

    Example:
        >>> import torch, warnings
        >>> warnings.simplefilter("ignore")
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, optimizer, loader = PrivacyEngine().make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        ...     noise_multiplier=1.1,
        ...     max_grad_norm=1.0,
        ...     clipping="backprop",
        ... )
        >>> optimizer.max_grad_norm, optimizer.layer_sensitivities
        (1.0, {})
    """

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        backprop: BackpropClipping | None = None,
        physical_batch_size: int | None = None,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Make training private.

        Args:
            module: the model.
            optimizer: over its parameters.
            criterion: the loss, whose gradients then do not depend on the batch's size: see
                `BackpropClipCriterion`. For Opacus's own clippings, as in Opacus.
            data_loader: the data set's loader; Poisson sampling takes its place.
            noise_multiplier: the noise's standard deviation over ``max_grad_norm``.
            max_grad_norm: joint L2 sensitivity of the summed gradient. One number with
                ``clipping="backprop"``.
            batch_first: whether the batch is the first axis of the model's inputs, or the second.
            loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
            poisson_sampling: whether every example enters a batch by a coin of its own.
            clipping: ``"backprop"``, or one of Opacus's own.
            backprop: the options of ``clipping="backprop"``; its defaults if left out.
            physical_batch_size: with ``clipping="backprop"``, the loader yields batches of exactly
                so many rows: a sample is cut into parts, filled up with rows of zeros that count
                for nothing. One step for each batch, as with `BatchMemoryManager`.
            noise_generator: what the noise is drawn from.
            grad_sample_mode: as in Opacus; ``"hooks"`` with ``clipping="backprop"``.
            wrap_model: whether to return the model wrapped, or the hooks that were attached to it.
            rand_on_empty: as in Opacus; not with ``clipping="backprop"``.
            **kwargs: what else Opacus takes for the other clippings.

        Returns:
            ``(module or hooks, optimizer, data_loader)``, as Opacus does; with a ``criterion``,
            ``(module or hooks, optimizer, criterion, data_loader)``. Every loss must then be
            computed with the one that is returned.

        Raises:
            CoverageError: the model has a trainable parameter that nothing bounds.
            ValueError: another argument is wrong. In both cases model and optimizer are unchanged.
        """
        made = extensions.make_private(
            super().make_private,
            self,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            backprop=backprop,
            physical_batch_size=physical_batch_size,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=rand_on_empty,
            **({} if criterion is None else {"criterion": criterion}),
            **kwargs,
        )
        self._optimizer = made[1]
        return made

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        backprop: BackpropClipping | None = None,
        physical_batch_size: int | None = None,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Make training private for a target epsilon.

        Args:
            module: as for `make_private`, like every argument that is not described here.
            optimizer: see there.
            criterion: see there.
            data_loader: see there.
            target_epsilon: what all epochs together may spend.
            target_delta: at this delta.
            epochs: how many there will be.
            max_grad_norm: see there.
            batch_first: see there.
            loss_reduction: see there.
            poisson_sampling: see there.
            clipping: see there.
            backprop: see there.
            physical_batch_size: see there.
            noise_generator: see there.
            grad_sample_mode: see there.
            wrap_model: see there.
            **kwargs: options of the accountant's search for the noise multiplier.
        """
        return extensions.make_private_with_epsilon(
            super().make_private_with_epsilon,
            self,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            backprop=backprop,
            physical_batch_size=physical_batch_size,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            **({} if criterion is None else {"criterion": criterion}),
            **kwargs,
        )

    def save_checkpoint(
        self, *, checkpoint_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Save as Opacus does, and the settings that privacy was spent under.

        Args:
            checkpoint_dict: what else to save.
            **kwargs: as for ``opacus.PrivacyEngine.save_checkpoint``.
        """
        settings = {} if self._settings is None else {fingerprint.KEY: self._settings}
        super().save_checkpoint(checkpoint_dict={**(checkpoint_dict or {}), **settings}, **kwargs)

    def load_checkpoint(self, *, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Load as Opacus does; warn if the settings were others.

        Args:
            optimizer: the private optimizer, if its state is to be loaded.
            **kwargs: as for ``opacus.PrivacyEngine.load_checkpoint``.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(optimizer=optimizer, **kwargs)
        # An optimizer has compared them already.
        if optimizer is None and self._settings is not None:
            fingerprint.compare(checkpoint.get(fingerprint.KEY), self._settings)
        return checkpoint

    @property
    def _settings(self) -> fingerprint.Settings | None:
        """Return the settings of the latest private training; ``None`` without any of ours."""
        optimizer = getattr(self, "_optimizer", None)
        return optimizer._settings() if isinstance(optimizer, OptimizerWrapper) else None

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: Any = None,
        data_loader: Any = None,
        clipping: str = "flat",
        backprop: BackpropClipping | None = None,
    ) -> None:
        """Raise if the model cannot be trained privately.

        Args:
            module: the model; it is not changed.
            optimizer: not looked at, as in Opacus.
            data_loader: for ``clipping="backprop"``, gives the shapes of the made-up examples that
                the model is tried out on; without one it is not run.
            clipping: the clipping that it is meant for; ``"backprop"`` has requirements of its own.
            backprop: its options.

        Raises:
            CoverageError: with ``clipping="backprop"``, something nobody bounds.
            UnsupportedModuleError: what Opacus itself refuses.
        """
        if clipping == "backprop":
            require_compatible(module, backprop, data_loader)
        else:
            extensions.refuse_options(clipping, backprop)
        super().validate(module=module, optimizer=optimizer, data_loader=data_loader)

    def is_compatible(self, **kwargs: Any) -> bool:
        """Return whether `validate`, with the same arguments, would raise nothing."""
        try:
            self.validate(**kwargs)
        except (CoverageError, UnsupportedModuleError):
            return False
        return True

    @classmethod
    def get_compatible_module(cls, module: nn.Module, *, clipping: str = "flat") -> nn.Module:
        """Return a copy in which what can be replaced is, and which is checked.

        With ``clipping="backprop"``, ``MultiheadAttention``, ``RNN``, ``LSTM`` and ``GRU`` become
        networks of layers that have rules; they compute the same, which is compared on made-up
        inputs, and have the same state dict. BatchNorm becomes GroupNorm, a frozen one keeps its
        running statistics (``docs/supported-layers.md``). Without it, this is Opacus's own method.

        Args:
            module: the model.
            clipping: the clipping that it is meant for.

        Raises:
            CoverageError: with ``clipping="backprop"``, something nobody bounds is left, or a
                replacement would compute something else than what it replaces.
            UnsupportedModuleError: what Opacus itself refuses is left.
        """
        if clipping != "backprop":
            return super().get_compatible_module(module)
        module = compatible_copy(module)
        require_compatible(module)
        ModuleValidator.validate(module, strict=True)
        return module

    def _prepare_model(self, module: nn.Module, **kwargs: Any) -> Any:
        return extensions.prepare_model(super()._prepare_model, self, module, **kwargs)

    def _prepare_data_loader(self, data_loader: Any, **kwargs: Any) -> Any:
        return extensions.prepare_data_loader(
            super()._prepare_data_loader, self, data_loader, **kwargs
        )

    def _prepare_optimizer(self, **kwargs: Any) -> Any:
        return extensions.prepare_optimizer(super()._prepare_optimizer, self, **kwargs)
