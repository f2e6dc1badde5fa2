"""Fills the masks of a sentence with the tokens that a masked language model finds likeliest.

The probabilities are the model's over its whole vocabulary. Each mask is filled independently, with the
others still in place, so that the numbers are those of transformers' `pipeline("fill-mask")`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import load_tokenizer, spell
from mlm.errors import UserError
from mlm.inference.sentences import encode, predict
from mlm.model.load import ModelConfig, load_trained
from mlm.model.sparse_head import SparseMaskedLM


class Filler(NamedTuple):
    token: str
    probability: float


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
