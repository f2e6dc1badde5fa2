"""Mistakes that the user can mend, each in one line."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a terminal obeys (control characters, except tab and newline), what reorders the text around it
# (https://www.unicode.org/reports/tr9/#Directional_Formatting_Characters), and surrogates, which have no encoding.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """What is wrong, where, and what to do, in one line, which the scripts print; they exit with status 2."""

    def __str__(self) -> str:
        return printable(super().__str__()).replace("\n", "\\n")


class TrainingFailed(UserError):
    """Training has destroyed the model, or taught it nothing: settings are to blame, no file and no machine."""


def printable(text: str) -> str:
    """Other people's text (documents, tokens, names of files and columns) for a terminal: an escape in letters."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: object, width: int = 300) -> str:
    """The text of an error, or of anything else, on one line of at most `width` characters."""
    # textwrap.shorten cuts at a blank: of a long path, or of a script without blanks, that leaves nothing.
    text = " ".join(str(error).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


@contextmanager
def in_words_of(text: str) -> Iterator[None]:
    """A context in which mistakes in a text of its own flags, `--<text>_file`, are not said of --train_file's."""
    try:
        yield
    except UserError as error:
        flag = re.compile(r"--(?:train_|validation_)?(file|dataset_|text_column)")
        raise UserError(flag.sub(rf"--{text}_\1", str(error))) from None


def listed(names: list[str]) -> str:
    """Names of parameters, as many of them as a line takes."""
    return one_line(f"{len(names)} parameters: {', '.join(names)}", 600)


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises UserError where a setting of these names that is a number is below `least`, infinite or NaN."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: at least {least}")


def at_most(config: Any, most: int, *names: str) -> None:
    """Raises UserError where a setting of these names that is a number is above `most`: a slip, or hours of work."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and value > most:
            raise UserError(f"--{name} {value}: at most {most:,}")


def explain_load_failure(what: str, name: str, error: Exception) -> UserError:
    """Words for a tokenizer, model or dataset, by Hub name or folder, that a library failed to load."""
    reason = one_line(f"{type(error).__name__}: {error}")
    if "trust_remote_code" in str(error):
        return UserError(f"{name} brings code of its own; read it, then run it with --trust_remote_code true")
    if Path(name).exists():
        return UserError(f"cannot load the {what} in {name}: {reason}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"no such folder: {name} (where a {what} was to be loaded from)")
    from_hub = f"from the Hub (no network, no such name, no access?) {reason}"
    return UserError(f"cannot load the {what} {name}: there is no such local folder, and {from_hub}")
