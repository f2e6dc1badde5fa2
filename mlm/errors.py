"""Mistakes that the user can mend, each in one line."""

import math
from pathlib import Path
from textwrap import shorten
from typing import Any


class UserError(Exception):
    """What is wrong, where, and what to do, in one line.

    The scripts print it on standard error without a traceback and exit with status 2.
    """


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises UserError where one of these settings of a configuration is below `least`, infinite or NaN.

    A setting that is None or a word ("epoch") is not looked at.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: at least {least}")


def explain_load_failure(what: str, name: str, error: Exception) -> UserError:
    """Words for a `from_pretrained` that failed: no such folder, no network, or the library's own words."""
    if isinstance(error, UserError):
        return error
    if Path(name).exists():
        return UserError(f"cannot load the {what} in {name}: {shorten(str(error), 300, placeholder=' …')}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"no such folder: {name} (where a {what} was to be loaded from)")
    return UserError(
        f"cannot load the {what} {name}: there is no such local folder, and the Hub did not give it "
        f"(no network, no such name, or no access: {type(error).__name__}); check the name, or give a folder"
    )
