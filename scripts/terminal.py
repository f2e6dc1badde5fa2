"""Text in the columns of a terminal, and the tables of filled masks."""

import math
from collections.abc import Sequence
from typing import Any

from tqdm.utils import disp_len, disp_trim

from mlm.errors import printable
from mlm.inference.fill_mask import Filler
from mlm.inference.targets import Target

PAGE = 100  # columns that a table may fill


def fit(text: str, width: int) -> str:
    """`text` cut or filled to `width` columns; what is cut ends in an ellipsis."""
    if disp_len(text) > width:
        text = f"{disp_trim(text, width - 1)}…"
    return text + " " * (width - disp_len(text))


def cell(found: Filler | Target | str) -> str:
    """A filler, or a target with its pieces where it has several."""
    if isinstance(found, Filler):
        return f"{found.probability:.4f}  {found.token}"
    if isinstance(found, str):
        return found
    pieces = f"  = {' '.join(found.pieces)}" if len(found.pieces) > 1 else ""
    return f"{found.log_probability:8.2f} nats  {math.exp(found.log_probability):<8.3g}  {found.word}{pieces}"


def cell_width(models: int) -> int:
    """The columns of a table's cell, after four blanks."""
    return PAGE // models - 4


def table(sentence: str, names: Sequence[str], answers: Sequence[Sequence[Sequence[Any]]]) -> str:
    """The answers of one or two models, `[model][mask][rank]`, side by side below the sentence.

    names: `[model]`, the heads of the columns where there are two
    """
    width = cell_width(len(names))

    def line(cells: Sequence[Any]) -> str:
        return "".join(f"    {fit(printable(cell(found)), width)}" for found in cells).rstrip()

    lines = [printable(sentence)]
    if len(names) > 1:  # a name that is too long keeps its end, where folders differ
        lines.append(line([name if len(name) <= width else f"…{name[1 - width :]}" for name in names]))
    masks = list(zip(*answers, strict=True))  # [mask][model][rank]
    for number, ranked in enumerate(masks, start=1):
        if len(masks) > 1:
            lines.append(f"  mask {number}")
        lines += map(line, zip(*ranked, strict=True))
    return "\n".join(lines)
