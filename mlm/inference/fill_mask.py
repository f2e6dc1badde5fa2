"""Fills the masks of a sentence with the tokens that a masked language model finds likeliest.

The probabilities are the model's over its whole vocabulary. Each mask is filled independently, with the
others still in place, so that the numbers are those of transformers' `pipeline("fill-mask")`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import load_tokenizer, spell
from mlm.errors import UserError, one_line
from mlm.model.load import ModelConfig, load_trained
from mlm.model.predict import check_length, same_length, without_dropout
from mlm.model.sparse_head import SparseMaskedLM

MASK = "[MASK]"  # how a sentence writes a mask, whatever the tokenizer's own mask token is
AT_A_TIME = 32  # sentences in a batch; does not change the results


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


def encode(
    model: SparseMaskedLM, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of each sentence, with the special tokens around it, and the positions of its masks: of `[MASK]` and of
    the tokenizer's own mask token. Raises UserError where a sentence has none or is longer than the model's position
    table, and where the tokenizer has no mask token."""
    if tokenizer.mask_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise UserError(f"the tokenizer {name} has no mask token; give the checkpoint of a masked language model")
    rows = [tokenizer(own_mask(tokenizer, text), verbose=False)["input_ids"] for text in sentences]
    masks = [[position for position, i in enumerate(row) if i == tokenizer.mask_token_id] for row in rows]
    for number, (sentence, row, positions) in enumerate(zip(sentences, rows, masks, strict=True), start=1):
        quoted = f"sentence {number} ({one_line(sentence, 60)!r})"
        if not positions:
            own = "" if tokenizer.mask_token == MASK else f" or {tokenizer.mask_token}"
            raise UserError(f"{quoted} has no mask: write {MASK}{own} where a token is to be filled in")
        check_length(model, quoted, row)
    return rows, masks


def own_mask(tokenizer: PreTrainedTokenizerBase, sentence: str) -> str:
    """The sentence with the tokenizer's own mask token for `[MASK]`; RoBERTa's takes a blank before it by itself."""
    return sentence.replace(MASK, tokenizer.mask_token)


@torch.inference_mode()
def predict(
    model: SparseMaskedLM,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    reduce: Callable[[Tensor], Sequence[Tensor]],
) -> list[list[tuple[Any, ...]]]:
    """What `reduce` makes of the logits at some positions of each row, without dropout or padding: `[row][position]`.

    reduce: float32 `[M, V]` -> tensors `[M, …]`, the entries of which come back as lists or numbers"""
    device, results = model.model.device, [[] for _ in rows]
    with without_dropout(model):
        for part in same_length(rows, AT_A_TIME):
            batch = torch.tensor([rows[i] for i in part])  # [B, T]
            flat = torch.tensor([b * batch.shape[1] + p for b, i in enumerate(part) for p in positions[i]])  # [M]
            logits = model(batch.to(device), flat.to(device)).float()
            reduced = zip(*(tensor.tolist() for tensor in reduce(logits)), strict=True)  # the device synchronises here
            for i in part:
                results[i] = [next(reduced) for _ in positions[i]]
    return results
