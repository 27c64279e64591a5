"""`PrivacyEngine`: Opacus's engine, which also accepts ``clipping="backprop"``."""

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
from opacus_bpclip.engine import checkpoints, extensions
from opacus_bpclip.engine.compatibility import require_compatible
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.replacements import compatible_copy


class PrivacyEngine(opacus.PrivacyEngine):
    """Opacus's engine with one more clipping method.

    ``make_private`` and ``make_private_with_epsilon`` accept ``clipping="backprop"`` and
    ``backprop=BackpropClipping(...)``; every other call is Opacus's own.

    Guarantee: ``max_grad_norm`` is the L2 sensitivity of a step's summed gradient, as with
    ``clipping="flat"``; the noise and the accounting are Opacus's. See ``docs/guarantee.md``.

    Examples:
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
            optimizer: the optimizer of its parameters.
            criterion: the loss, whose gradients then do not depend on the size of the batch: see
                `BackpropClipCriterion`. With Opacus's own clippings, as in Opacus.
            data_loader: the loader of the data set; it is replaced by one with Poisson sampling.
            noise_multiplier: the standard deviation of the noise, divided by ``max_grad_norm``.
            max_grad_norm: the L2 sensitivity of the summed gradient; with ``clipping="backprop"``
                one number.
            batch_first: whether the batch is the first axis of the inputs; otherwise the second.
            loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
            poisson_sampling: whether examples enter a batch independently of each other.
            clipping: ``"backprop"``, or one of Opacus's own.
            backprop: the options of ``clipping="backprop"``; the defaults if ``None``.
            physical_batch_size: with ``clipping="backprop"``, the number of rows in every batch
                that the loader yields. A logical batch is split into physical batches, and padded
                with rows that contribute zero. The training loop is that of `BatchMemoryManager`.
            noise_generator: the generator of the noise; by default torch's. With
                ``clipping="backprop"``, the default is one that torch's seeds once, here; calls
                after an engine's first one seed generators of their own from this and from
                ``data_loader.generator``, so that equal seeds do no harm; after a checkpoint the
                operating system does.
            grad_sample_mode: as in Opacus; ``"hooks"`` with ``clipping="backprop"``.
            wrap_model: whether to return the wrapped model; otherwise the hooks attached to it.
            rand_on_empty: as in Opacus; not with ``clipping="backprop"``.
            **kwargs: further arguments of Opacus for the other clippings.

        Returns:
            ``(module or hooks, optimizer, data_loader)``, as in Opacus; with a ``criterion``,
            ``(module or hooks, optimizer, criterion, data_loader)``. Every loss must then be
            computed with the returned criterion.

        Raises:
            CoverageError: no rule bounds some trainable parameter, or examples are coupled.
            ValueError: another argument is wrong. In both cases model and optimizer are unchanged.
        """
        return extensions.make_private(
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
        """Make training private for a target epsilon; results and errors are `make_private`'s.

        Args:
            module: the model.
            optimizer: the optimizer of its parameters.
            criterion: the loss.
            data_loader: the loader of the data set.
            target_epsilon: the epsilon to spend in all epochs together.
            target_delta: the delta of that epsilon.
            epochs: the number of epochs.
            max_grad_norm: the L2 sensitivity of the summed gradient.
            batch_first: whether the batch is the first axis of the inputs; otherwise the second.
            loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
            poisson_sampling: whether examples enter a batch independently of each other.
            clipping: ``"backprop"``, or one of Opacus's own.
            backprop: the options of ``clipping="backprop"``; the defaults if ``None``.
            physical_batch_size: the number of rows in every batch that the loader yields.
            noise_generator: the generator of the noise.
            grad_sample_mode: as in Opacus; ``"hooks"`` with ``clipping="backprop"``.
            wrap_model: whether to return the wrapped model; otherwise the hooks attached to it.
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
        """Save what Opacus saves, the settings that decide the privacy spent, and whose steps.

        Args:
            checkpoint_dict: further entries to save.
            **kwargs: the arguments of ``opacus.PrivacyEngine.save_checkpoint``.
        """
        checkpoints.save_checkpoint(
            super().save_checkpoint, self, checkpoint_dict=checkpoint_dict, **kwargs
        )

    def load_checkpoint(self, *, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Load what Opacus loads; warn if the saved settings differ from the present ones.

        Steps that the accountant has counted and the checkpoint lacks stay counted, with a
        warning, so epsilon never falls. From then on the operating system seeds the noise and the
        samples of all that this engine makes private with ``clipping="backprop"``: training goes on
        with other random numbers than before, also with the same seeds.

        Args:
            optimizer: the private optimizer, if its state is to be loaded.
            **kwargs: the arguments of ``opacus.PrivacyEngine.load_checkpoint``.
        """
        return checkpoints.load_checkpoint(
            super().load_checkpoint, self, optimizer=optimizer, **kwargs
        )

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
            optimizer: not used, as in Opacus.
            data_loader: with ``clipping="backprop"``, gives the shapes of the made-up examples on
                which the model is tried; without one, it is not run.
            clipping: the intended clipping; ``"backprop"`` has requirements of its own.
            backprop: the options of ``clipping="backprop"``.

        Raises:
            CoverageError: with ``clipping="backprop"``, no rule bounds some trainable parameter,
                or examples are coupled.
            UnsupportedModuleError: Opacus refuses the model.
            ValueError: the options do not fit the data.
        """
        if clipping == "backprop":
            require_compatible(module, backprop, data_loader)
        else:
            extensions.refuse_options(clipping, backprop)
        super().validate(module=module, optimizer=optimizer, data_loader=data_loader)

    def is_compatible(self, **kwargs: Any) -> bool:
        """Return whether `validate` with the same arguments raises no error."""
        try:
            self.validate(**kwargs)
        except (CoverageError, UnsupportedModuleError, ValueError):
            return False
        return True

    @classmethod
    def get_compatible_module(cls, module: nn.Module, *, clipping: str = "flat") -> nn.Module:
        """Return a checked copy of a model in which replaceable layers are replaced.

        With ``clipping="backprop"``, ``MultiheadAttention``, ``RNN``, ``LSTM`` and ``GRU`` become
        networks of layers that have rules. They have the same state dict and compute the same,
        which is checked on made-up inputs. BatchNorm becomes GroupNorm; a frozen one keeps its
        running statistics (``docs/supported-layers.md``). Otherwise this is Opacus's own method.

        Args:
            module: the model; it is not changed.
            clipping: the intended clipping.

        Raises:
            CoverageError: with ``clipping="backprop"``, the copy still has a trainable parameter
                that no rule bounds, or a replacement computes something else.
            UnsupportedModuleError: Opacus refuses the copy.
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
