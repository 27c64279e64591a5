"""The errors that the package raises when it refuses a model or a batch."""

from opacus.validators.errors import UnsupportedModuleError


class CoverageError(UnsupportedModuleError, ValueError):
    """The gradients of a model, a layer or an option cannot be bounded; raised before training."""


class PrivacyViolationError(ValueError, RuntimeError):
    """The guarantee does not cover a batch; raised before its gradients can be used.

    Afterwards ``optimizer.step()`` refuses to run until ``optimizer.zero_grad()`` has discarded
    the batch's gradients.
    """
