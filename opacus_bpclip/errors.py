"""The two ways in which the package refuses to go on."""


class CoverageError(ValueError):
    """A model, an option or a layer that cannot be bounded; raised before training starts."""


class PrivacyViolationError(RuntimeError):
    """A batch whose gradient is not covered by the guarantee; raised before it can be used.

    After it, ``optimizer.step()`` refuses to run until ``optimizer.zero_grad()`` has thrown the
    batch's gradients away.
    """
