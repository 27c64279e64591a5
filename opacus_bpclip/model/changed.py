"""Messages about parameters that are no longer what `make_private` has examined."""

from __future__ import annotations


def unfrozen_problem(name: str) -> str:
    """Return the message for a parameter that was unfrozen after the examination."""
    return (
        f"{name} was frozen when make_private was called and has been unfrozen since, so its "
        "gradient is not clipped. Unfreeze it first, then call make_private again."
    )


def replaced_problem(name: str) -> str:
    """Return the message for a parameter in the place of one that was examined."""
    return (
        f"{name} is not the parameter that make_private saw: it was replaced, "
        "it is computed from another (functional_call, spectral_norm), or the module's "
        "forward calls the module. Change the model first, then call make_private."
    )


def added_problem(name: str) -> str:
    """Return the message for a parameter that the model got after the examination."""
    return (
        f"{name} was not a parameter of the model when make_private was called, so its gradient "
        "is not clipped. Call cleanup() on the private model, add it, then call make_private "
        "again; or freeze it."
    )


def edited_problem(name: str) -> str:
    """Return the message for a parameter that a forward pass changes."""
    return (
        f"{name} was changed by the model's own forward pass. What the parameter learns about a "
        "batch in this way is neither bounded nor noised. Compute with a changed copy of it, in a "
        "module with a rule, or change it between steps, from public values."
    )
