"""Take what a command line names, ``module:name``, out of the user's own code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load_object(path: str) -> Any:
    """Import a module and return what one of its names stands for.

    Args:
        path: ``module:name`` or ``package.module:name.attribute``.

    Raises:
        ValueError: there is no such module, or no such name in it.

    Example:
        >>> load_object("math:pi")
        3.141592653589793
    """
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise ValueError(f"{path!r} is not of the form MODULE:FACTORY, as in my_package.models:Net")
    # A console script does not look for modules where it is started.
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    return found


def made_by(path: str) -> Any:
    """Return what the callable at ``module:name`` makes without arguments.

    Raises:
        ValueError: there is none, or it needs arguments.
    """
    found = load_object(path)
    if not callable(found):
        raise ValueError(f"{path} is not callable")
    try:
        return found()
    except TypeError as error:
        raise ValueError(f"{path} cannot be called without arguments: {error}") from error
