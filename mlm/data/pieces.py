"""Long documents in pieces, cut where no token can tell: memory grows with a document's characters, not its tokens.

document     …owls like mice. Foxes like grapes…        a fast tokenizer takes some 200 bytes a character
window                mice. Foxes                       around a white space near a piece's end
tried        "mice." + " Foxes"                         the white space to the next piece,
             "mice. " + "Foxes"                         to this one,
             "mice." + "Foxes"                          or to none: whichever gives the window's own tokens"""

import re
from collections.abc import Callable, Iterator

PIECE = 100_000  # characters; a cut is sought in the last tenth of a piece
WINDOW = 200  # characters on each side of a cut that are tokenised with it and without
TRIES = 20  # places at which a cut is tried, before the piece grows instead
# Between two words, else after a punctuation mark or character of a script without spaces.
BREAKS = (re.compile(r"(?<=\S)\s(?=\S)"), re.compile(r"(?<=[^\w\s])(?=\w)"), re.compile(r"(?<=[^\x00-\u2e7f])(?=\w)"))

Encode = Callable[[str], tuple[list[int], list[bool]]]
"""text -> its ids, and where its words begin"""


def cut(text: str, encode: Encode) -> Iterator[tuple[str, bool]]:
    """Pieces of about PIECE characters whose tokens and words, one after the other, are those of `text`; each with
    whether it is the last. A piece grows where no cut is found: a text without a break is one piece."""
    begin, limit = 0, PIECE
    while limit < len(text):
        if found := _find_cut(text, limit, encode):
            yield text[begin : found[0]], False
            begin = limit = found[1]
        limit += PIECE
    yield text[begin:], True


def _find_cut(text: str, limit: int, encode: Encode) -> tuple[int, int] | None:
    """Where a piece may end, and the next begin, shortly before `limit`."""
    for pattern in BREAKS:
        places = [found.start() for found in pattern.finditer(text, limit - PIECE // 10, limit)]
        for place in places[: -TRIES - 1 : -1]:
            begin, end = max(place - WINDOW, 0), place + WINDOW
            ids, starts = encode(text[begin:end])
            for stop, following in ((place, place), (place + 1, place + 1), (place, place + 1)):
                left, right = encode(text[begin:stop]), encode(text[following:end])
                if (left[0] + right[0], left[1] + right[1]) == (ids, starts):
                    return stop, following
    return None
