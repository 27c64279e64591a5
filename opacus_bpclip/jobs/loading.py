"""Take what a command line names, ``module:name``, out of the user's own code."""

from __future__ import annotations

import os
import pkgutil
import sys
from typing import Any, TypeVar

from opacus_bpclip.jobs.errors import UsageError, in_one_line, told_of_users_code

Made = TypeVar("Made")


def load_object(path: str) -> Any:
    """Import a module and return what one of its names stands for.

    Args:
        path: ``module:name`` or ``package.module:name.attribute``.

    Raises:
        UsageError: there is no such module, no such name in it, or it raises when it is imported.

    Example:
        >>> load_object("math:pi")
        3.141592653589793
    """
    # A console script does not look for modules where it is started.
    sys.path.insert(0, os.getcwd())
    try:
        if not path.partition(":")[2]:
            raise ValueError("it is not of the form MODULE:FACTORY, as in my_package.models:Net")
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot load {path}: {error}") from error
    except Exception as error:
        raise UsageError(f"cannot load {path}: {in_one_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())


def made_by(path: str, kind: type[Made]) -> Made:
    """Return what the callable at ``module:name`` makes without arguments, or what is there.

    Args:
        path: as for `load_object`.
        kind: of what is wanted.

    Raises:
        UsageError: there is none, it needs arguments, raises, or makes something else.
    """
    return made(load_object(path), path, kind)


def made(found: Any, path: str, kind: type[Made]) -> Made:
    """Return what an object makes without arguments, or the object, where it is of a kind.

    Args:
        found: the object.
        path: what errors call it.
        kind: of what is wanted.

    Raises:
        UsageError: as for `made_by`.
    """
    if not isinstance(found, kind):
        if not callable(found):
            raise UsageError(f"{path} is neither callable nor a {kind.__name__}")
        with told_of_users_code(path):
            try:
                found = found()
            except TypeError as error:
                # What is raised in the call itself, and not in what is called, has no frame below.
                if error.__traceback__ is None or error.__traceback__.tb_next is None:
                    text = f"{path} cannot be called without arguments: {error}"
                    raise UsageError(text) from error
                raise
    if not isinstance(found, kind):
        raise UsageError(f"{path} makes a {type(found).__name__}, not a {kind.__name__}")
    return found
