"""Text in the columns of a terminal."""

import unicodedata

PAGE = 100  # columns that a table may fill


def columns(text: str) -> int:
    """How many terminal columns `text` takes: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def fit(text: str, width: int) -> str:
    """`text` cut or filled to `width` terminal columns; what is cut ends in an ellipsis."""
    if columns(text) <= width:
        return text + " " * (width - columns(text))
    kept, left = "", width - 1
    for character in text:
        if (left := left - columns(character)) < 0:
            break
        kept += character
    return f"{kept}…" + " " * (width - 1 - columns(kept))
