"""The probability of given words at the masks of a sentence, words of several pieces included.

A word of n pieces takes n masks. Its pieces are filled in from left to right, by the chain rule:

    log p(word) = Σ_j log p(piece_j | the sentence, the pieces before j in their places, masks for the rest)

For one piece this is the probability of `mlm.inference.fill_mask.fill`. For several it is PLL-word-l2r of Kauf and
Ivanova (2023, arXiv:2305.10588). transformers' `pipeline("fill-mask", targets=…)` takes the first piece for the word
(its issues 4306, 9678, 17374). The number of masks reveals the word's length: the probabilities of words of one length
sum to at most 1, those of words of several lengths form no distribution."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import template
from mlm.errors import UserError
from mlm.inference.fill_mask import encode, own_mask, predict
from mlm.model.predict import check_length
from mlm.model.sparse_head import SparseMaskedLM

Place = tuple[tuple[int, ...], int]  # a row with masks, a position in it


class Target(NamedTuple):
    word: str
    pieces: tuple[str, ...]  # as the vocabulary spells them
    log_probability: float  # nats


def score_targets(
    model: SparseMaskedLM, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], targets: Sequence[str]
) -> list[list[list[Target]]]:
    """The log-probability of each target at every mask, the others in place: `[sentence][mask][target]`.

    Raises UserError as `encode` does, where the tokenizer does not know a target or makes no token of it, and where
    its pieces make a sentence longer than the model's position table."""

    def chain(word: str, sentence: str, row: list[int], mask: int, at: int) -> list[tuple[Place, int]]:
        pieces = _pieces(tokenizer, sentence, row[:at], mask, word)
        masks = [tokenizer.mask_token_id] * len(pieces)
        rows = ((*row[:at], *pieces[:j], *masks[j:], *row[at + 1 :]) for j in range(len(pieces)))
        return [((row, at + j), piece) for j, (row, piece) in enumerate(zip(rows, pieces, strict=True))]

    rows, masks = encode(model, tokenizer, sentences)
    chains = [
        [[chain(word, sentence, row, mask, at) for word in targets] for mask, at in enumerate(positions)]
        for sentence, row, positions in zip(sentences, rows, masks, strict=True)
    ]
    steps = [step for sentence in chains for words in sentence for chain in words for step in chain]
    check_length(model, "with the targets in it a sentence", max((row for (row, _), _ in steps), key=len))
    tokens = sorted({piece for _, piece in steps})
    rows, positions = zip(*dict.fromkeys(place for place, _ in steps), strict=True)  # targets share predictions
    found = predict(model, rows, [[at] for at in positions], lambda logits: [logits.log_softmax(-1)[:, tokens]])
    scores = {
        (row, at, token): score
        for row, at, [(values,)] in zip(rows, positions, found, strict=True)
        for token, score in zip(tokens, values, strict=True)
    }

    def target(word: str, chain: list[tuple[Place, int]]) -> Target:
        pieces = tokenizer.convert_ids_to_tokens([piece for _, piece in chain])
        return Target(word, tuple(pieces), sum(scores[*place, piece] for place, piece in chain))

    return [[[*map(target, targets, words)] for words in sentence] for sentence in chains]


def _pieces(tokenizer: PreTrainedTokenizerBase, sentence: str, before: list[int], mask: int, word: str) -> list[int]:
    """The ids of `word` in the place of a mask, encoded together with the text before the mask.

    So a blank before it belongs to its first piece ("a [MASK]": RoBERTa's `Ġfilm`), and a word that has begun goes on
    ("un[MASK]": BERT's `##able`). Where the text would not keep its own ids `before` (the mask token does not absorb
    the blank, or letters merge), the word is encoded on its own."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    text = own_mask(tokenizer, sentence).split(tokenizer.mask_token)
    start = tokenizer.mask_token.join(text[: mask + 1])
    before = before[len(template(tokenizer)[0]) :]
    pieces = ids(start + word)
    pieces = pieces[len(before) :] if pieces[: len(before)] == before else ids(word)
    if not pieces:
        raise UserError(f"--targets: {word!r} is no text to the tokenizer {tokenizer.name_or_path}")
    if special := set(pieces) & set(tokenizer.all_special_ids):
        refused = f"--targets: {word!r} is no word that {tokenizer.name_or_path} could predict"
        raise UserError(f"{refused}: its tokenizer makes {tokenizer.convert_ids_to_tokens(min(special))} of it")
    return pieces
