"""The two ways in which the package refuses to go on."""

from opacus.validators.errors import UnsupportedModuleError


class CoverageError(UnsupportedModuleError, ValueError):
    """A model, an option or a layer that cannot be bounded; raised before training starts."""


class PrivacyViolationError(ValueError, RuntimeError):
    """A batch whose gradient is not covered by the guarantee; raised before it can be used.

    After it, ``optimizer.step()`` refuses to run until ``optimizer.zero_grad()`` has thrown the
    batch's gradients away.
    """
