"""Fills the masks of sentences: the likeliest tokens of a checkpoint, and of its base beside it.

The masks of a sentence are filled independently, or jointly with --order left_to_right or confidence;
--targets scores given words instead.
"""

from collections.abc import Sequence
from typing import Any

from mlm.startup import quick_imports

with quick_imports():
    from mlm import cli
    from mlm.errors import UserError
    from mlm.files import read_sentences
    from mlm.inference.fill_mask import FillMaskConfig, cell_width, fill, load, table
    from mlm.inference.joint import cells, fill_jointly
    from mlm.inference.sentences import MASK
    from mlm.inference.targets import parse_targets, score_targets


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
            answer = [[ranked] for ranked in cells(answer, cell_width(len(names)))]
        print(table(sentence, names, answer), end="\n\n")
    records = [
        [{"text": text, key: _plain(found)} for text, found in zip(given, answer, strict=True)] for answer in answers
    ]
    return {"sentences": records[-1]} | ({"base": records[0]} if config.compare else {})


def _plain(found: Any) -> Any:
    """Lists of named tuples, however deep, with a dict for each."""
    return [_plain(entry) for entry in found] if isinstance(found, list) else found._asdict()


if __name__ == "__main__":
    cli.run(main)
