"""Fills the masks of a sentence jointly: each filler is chosen with the earlier ones in their places.

The masks are filled one at a time, and the log-probability of the filled sentence is the sum over the masks of

    log p(filler | the sentence, the fillers so far in their places, masks for the rest)

The order decides which mask is filled next: `left_to_right` takes the first of the remaining masks, `confidence` the
one whose likeliest token has the highest probability, the first of equals. These are the order-based and the
confidence-based decoding of X-FACTR (Jiang et al. 2020, arXiv:2010.06189). Under either order the probabilities of all
ways to fill the masks sum to 1, because the fillers so far determine which mask is next. But a masked language model
defines no joint distribution: the two orders give the same sentence different probabilities."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import spell, template
from mlm.figures import unspaced
from mlm.inference.fill_mask import encode, predict
from mlm.model.sparse_head import SparseMaskedLM


class Filled(NamedTuple):
    text: str  # as the tokenizer decodes it
    tokens: tuple[str, ...]  # of the masks from left to right
    log_probability: float  # nats, of all fillers jointly


class _Hypothesis(NamedTuple):
    row: list[int]
    left: list[int]  # positions of the masks that are not filled in
    log_probability: float


def fill_jointly(
    model: SparseMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    order: Literal["left_to_right", "confidence"],
    num_beams: int,
) -> list[list[Filled]]:
    """The likeliest ways to fill all masks, by beam search: `[sentence][rank]`, likeliest first.

    At most `num_beams` are kept after each mask. Equally likely ones are ordered by the ids of their fillers, compared
    in the order in which the masks were filled. Raises UserError as `encode` does."""

    def surest(logits: Tensor) -> list[Tensor]:
        ranked = logits.log_softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # `topk` promises no order
        return [values[:, :num_beams] for values in ranked]

    rows, masks = encode(model, tokenizer, sentences)
    beams = [[_Hypothesis(row, left, 0.0)] for row, left in zip(rows, masks, strict=True)]
    while growing := [(i, hypothesis) for i, beam in enumerate(beams) for hypothesis in beam if hypothesis.left]:
        places = [h.left[:1] if order == "left_to_right" else h.left for _, h in growing]
        best = predict(model, [h.row for _, h in growing], places, surest)
        grown: dict[int, list[_Hypothesis]] = {i: [] for i, _ in growing}
        for (i, hypothesis), positions, ranked in zip(growing, places, best, strict=True):
            # `max` takes the first of equals
            at, fillers = max(zip(positions, ranked, strict=True), key=lambda pair: pair[1][0][0])
            row, left, so_far = hypothesis
            left = [p for p in left if p != at]
            grown[i] += [
                _Hypothesis([*row[:at], t, *row[at + 1 :]], left, so_far + p) for p, t in zip(*fillers, strict=True)
            ]
        for i, hypotheses in grown.items():
            beams[i] = sorted(hypotheses, key=lambda h: -h.log_probability)[:num_beams]  # stable
    before, after = map(len, template(tokenizer))

    def filled(positions: list[int], hypothesis: _Hypothesis) -> Filled:
        row, tokens = hypothesis.row, tuple(spell(tokenizer, [hypothesis.row[p]]) for p in positions)
        text = unspaced(tokenizer.decode(row[before : len(row) - after]))
        return Filled(text, tokens, hypothesis.log_probability)

    return [[filled(at, h) for h in beam] for at, beam in zip(masks, beams, strict=True)]
