"""Fills the masks of sentences: the likeliest tokens of a checkpoint, and of its base beside it."""

from collections.abc import Sequence
from typing import Any

from mlm import cli
from mlm.errors import UserError
from mlm.fill_mask import MASK, Filler, FillMaskConfig, fill, load, table


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = cli.command(__doc__)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help=f'such as "This is a great {MASK}."')
    config, rest = cli.parse([FillMaskConfig], argv, parser)
    if not config.model_name_or_path:
        raise UserError("which model? name a checkpoint with --model_name_or_path")
    if not rest.sentences:
        raise UserError(f'no sentence: write one in quotes, such as "This is a great {MASK}."')

    names = [name for name in (config.compare, config.model_name_or_path) if name]
    models = [load(name, config.trust_remote_code) for name in names]
    sentences = rest.sentences
    for _, tokenizer in models:  # a mask token of either model is a mask to both
        sentences = [sentence.replace(tokenizer.mask_token or MASK, MASK) for sentence in sentences]
    answers = [fill(model, tokenizer, sentences, config.top_k) for model, tokenizer in models]

    for sentence, *fillers in zip(rest.sentences, *answers, strict=True):
        print(table(sentence, names, fillers), end="\n\n")
    records = [_records(rest.sentences, answer) for answer in answers]
    return {"sentences": records[-1]} | ({"base": records[0]} if config.compare else {})


def _records(sentences: Sequence[str], answer: list[list[list[Filler]]]) -> list[dict[str, Any]]:
    return [
        {"text": text, "masks": [[filler._asdict() for filler in fillers] for fillers in masks]}
        for text, masks in zip(sentences, answer, strict=True)
    ]


if __name__ == "__main__":
    cli.run(main)
