"""Fills the masks of a sentence with the tokens that a masked language model finds likeliest.

The probabilities are the model's over its whole vocabulary. Each mask is filled independently, with the
others still in place, so that the numbers are those of transformers' `pipeline("fill-mask")`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from mlm.columns import PAGE, fit
from mlm.data.tokenizer import load_tokenizer, spell
from mlm.errors import UserError, at_least, printable
from mlm.inference.sentences import encode, predict
from mlm.model.load import ModelConfig, load_trained
from mlm.model.sparse_head import SparseMaskedLM

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


class Filler(NamedTuple):
    token: str
    probability: float

    def __str__(self) -> str:
        return f"{self.probability:.4f}  {self.token}"


def load(name: str, trust_remote_code: bool = False) -> tuple[SparseMaskedLM, PreTrainedTokenizerBase]:
    """A checkpoint and its tokenizer, by Hub name or folder, the model on accelerate's device. Raises UserError
    where either cannot be loaded, they do not fit each other, or the model takes one length only."""
    tokenizer = load_tokenizer(name, trust_remote_code)
    config = ModelConfig(model_name_or_path=name, trust_remote_code=trust_remote_code)
    return load_trained(config, tokenizer, PartialState().device), tokenizer


def fill(
    model: SparseMaskedLM, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], top_k: int
) -> list[list[list[Filler]]]:
    """The `top_k` likeliest fillers of every mask: `[sentence][mask][rank]`. Raises UserError as `encode` does, and
    where `top_k` is above the size of the vocabulary."""
    vocabulary = model.model.config.get_text_config().vocab_size
    if top_k > vocabulary:
        raise UserError(f"--top_k {top_k}: the model's vocabulary has {vocabulary} tokens")
    rows, masks = encode(model, tokenizer, sentences)
    best = predict(model, rows, masks, lambda logits: logits.softmax(dim=-1).topk(top_k))
    return [
        [[Filler(spell(tokenizer, [token]), p) for p, token in zip(*ranked, strict=True)] for ranked in at_masks]
        for at_masks in best
    ]


def cell_width(models: int) -> int:
    """The columns of a table's cell, after four blanks."""
    return PAGE // models - 4


def table(sentence: str, names: Sequence[str], answers: Sequence[Sequence[Sequence[Any]]]) -> str:
    """The answers of one or two models, `[model][mask][rank]`, side by side below the sentence, as `str` gives them.

    names: `[model]`, the heads of the columns where there are two
    """
    width = cell_width(len(names))

    def line(cells: Sequence[Any]) -> str:
        return "".join(f"    {fit(printable(str(cell)), width)}" for cell in cells).rstrip()

    lines = [printable(sentence)]
    if len(names) > 1:  # a name that is too long keeps its end, where folders differ
        lines.append(line([name if len(name) <= width else f"…{name[1 - width :]}" for name in names]))
    masks = list(zip(*answers, strict=True))  # [mask][model][rank]
    for number, ranked in enumerate(masks, start=1):
        if len(masks) > 1:
            lines.append(f"  mask {number}")
        lines += map(line, zip(*ranked, strict=True))
    return "\n".join(lines)
