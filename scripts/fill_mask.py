"""Fills the masks of sentences: the likeliest tokens of a checkpoint, and of its base beside it.

The masks of a sentence are filled independently, or jointly with --order left_to_right or confidence;
--targets scores given words instead.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from startup import quick_imports

with quick_imports():
    from joint import Filled, fill_jointly
    from sentences import read_sentences
    from terminal import cell_width, table
    from tqdm.utils import disp_len

    from mlm import cli
    from mlm.errors import UserError, at_least, printable
    from mlm.inference.fill_mask import MASK, fill, load
    from mlm.inference.targets import score_targets


Order = Literal["independent", "left_to_right", "confidence"]


@dataclass(frozen=True)
class FillMaskConfig:
    """Which models fill the masks, how, and how many fillers are shown."""

    model_name_or_path: str | None = None  # Fill masks with this checkpoint, a Hub name or a folder.
    compare: str | None = None  # Show this second checkpoint, the base, beside it.
    sentences_file: str | None = None  # Read sentences from this text file, one a line (-: standard input).
    top_k: int = 5  # Show this many fillers for each mask, or ways to fill a sentence.
    order: Order = "independent"  # Fill masks each on its own, or jointly: one after the other, or the surest first.
    num_beams: int | None = None  # A joint order keeps this many sentences as beams (default: --top_k).
    targets: str | None = None  # Score these words instead, separated by commas: good,bad,"so, so".
    trust_remote_code: bool = False  # Run the Python code that a checkpoint brings along.

    def __post_init__(self) -> None:
        at_least(self, 1, "top_k", "num_beams")
        if self.num_beams is not None and self.order == "independent":
            raise UserError("--num_beams: beam search fills jointly; give --order left_to_right or confidence")
        if self.targets is not None and self.order != "independent":
            raise UserError(f"--targets scores given words, --order {self.order} searches for some: give one")


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = cli.command(__doc__)
    parser.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help=f'Write it in quotes: "This is a great {MASK}."'
    )
    config, rest = cli.parse([FillMaskConfig], argv, parser)
    if not config.model_name_or_path:
        raise UserError("which model? name a checkpoint with --model_name_or_path")
    if rest.sentences and config.sentences_file:
        raise UserError("sentences twice: those of --sentences_file, or those written here?")
    if not rest.sentences and not config.sentences_file:
        raise UserError(
            f'no sentence: write one in quotes, such as "This is a great {MASK}.", or give --sentences_file'
        )
    given = rest.sentences or list(read_sentences(config.sentences_file).values())
    targets = None if config.targets is None else parse_targets(config.targets)

    names = [name for name in (config.compare, config.model_name_or_path) if name]
    models = [load(name, config.trust_remote_code) for name in names]
    sentences = given
    for _, tokenizer in models:  # a mask token of either model is a mask to both
        sentences = [sentence.replace(tokenizer.mask_token or MASK, MASK) for sentence in sentences]

    if targets:
        answers = [score_targets(*model, sentences, targets) for model in models]
        key = "targets"
    elif config.order == "independent":
        answers = [fill(*model, sentences, config.top_k) for model in models]
        key = "masks"
    else:
        beams = config.num_beams or config.top_k
        found = [fill_jointly(*model, sentences, config.order, beams) for model in models]
        answers = [[filled[: config.top_k] for filled in answer] for answer in found]
        key = "filled"
    for sentence, *answer in zip(given, *answers, strict=True):
        if key == "filled":
            answer = [[ranked] for ranked in joint_cells(answer, cell_width(len(names)))]
        print(table(sentence, names, answer), end="\n\n")
    records = [
        [{"text": text, key: _plain(found)} for text, found in zip(given, answer, strict=True)] for answer in answers
    ]
    return {"sentences": records[-1]} | ({"base": records[0]} if config.compare else {})


def parse_targets(text: str) -> list[str]:
    """The words of `good,so so,"1,000"`: separated by commas, quoted where they contain one (as in CSV), each once.

    Raises UserError where a word is missing.
    """
    [cells] = csv.reader([" ".join(text.split()) or " "], skipinitialspace=True)
    words = list(dict.fromkeys(cell.strip() for cell in cells))
    if "" in words:
        raise UserError(f"--targets {text!r}: expected words with commas between them, such as good,bad")
    return words


def _plain(found: Any) -> Any:
    """Lists of named tuples, however deep, with a dict for each."""
    return [_plain(entry) for entry in found] if isinstance(found, list) else found._asdict()


def joint_cells(answers: Sequence[Sequence[Filled]], width: int) -> list[list[str]]:
    """`[model][rank]`, cells of a table: sentences, or the fillers alone where one is wider than `width`."""
    with_text = [[f"{f.log_probability:8.2f} nats  {printable(f.text)}" for f in answer] for answer in answers]
    if all(disp_len(cell) <= width for answer in with_text for cell in answer):
        return with_text
    return [[f"{filled.log_probability:8.2f} nats  {' … '.join(filled.tokens)}" for filled in a] for a in answers]


if __name__ == "__main__":
    cli.run(main)
