"""Sentences of a user: read from a file, encoded with their masks, predicted without padding."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm.errors import UserError, one_line
from mlm.model.sparse_head import SparseMaskedLM

MASK = "[MASK]"  # how a sentence writes a mask, whatever the tokenizer's own mask token is
AT_A_TIME = 32  # sentences in a batch; does not change the results


def encode(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], longest: int | None) -> list[list[int]]:
    """The ids of each sentence, with the special tokens around it.

    A mask is `[MASK]` or the tokenizer's own mask token. Raises UserError where a sentence has no mask or
    more than `longest` ids, and where the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no mask token; "
            "give the checkpoint of a masked language model"
        )
    ids = [tokenizer(own_mask(tokenizer, text), verbose=False)["input_ids"] for text in sentences]
    for number, (sentence, row) in enumerate(zip(sentences, ids, strict=True), start=1):
        quoted = f"sentence {number} ({one_line(sentence, 60)!r})"
        if tokenizer.mask_token_id not in row:
            own = "" if tokenizer.mask_token == MASK else f" or {tokenizer.mask_token}"
            raise UserError(f"{quoted} has no mask: write {MASK}{own} where a token is to be filled in")
        if longest is not None and len(row) > longest:
            raise UserError(
                f"{quoted} is {len(row)} tokens long, the model's position table takes {longest}: shorten it"
            )
    return ids


def own_mask(tokenizer: PreTrainedTokenizerBase, sentence: str) -> str:
    """The sentence with the tokenizer's own mask token in the place of `[MASK]`.

    Blanks around the mask stay: RoBERTa's mask token absorbs the blank before it, but in the tokenizer
    (lstrip).
    """
    return sentence.replace(MASK, tokenizer.mask_token)


def mask_positions(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> list[int]:
    return [position for position, token_id in enumerate(row) if token_id == tokenizer.mask_token_id]


@torch.inference_mode()
def predict(
    model: SparseMaskedLM, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Tensor]]:
    """The model's logits at some positions of each row, without dropout, a batch at a time.

    Args:
        rows: `[row][T of the row]`, the ids of sentences, special tokens included.
        positions: `[row][M of the row]`, where to predict.

    Yields:
        The numbers of the rows of a batch, and the logits, float32 `[M, V]` on the model's device, at the
        positions of the first of them, then of the second, and so on.
    """
    was_training = model.training
    model.eval()
    try:
        # Only rows of one length share a batch, because padding can change the results: the convolutions of
        # ConvBERT and MobileBERT look past the attention mask.
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for length, same in groupby(by_length, key=lambda i: len(rows[i])):
            numbers = list(same)
            for first in range(0, len(numbers), AT_A_TIME):
                part = numbers[first : first + AT_A_TIME]
                batch = torch.tensor([rows[i] for i in part])  # [B, T]
                flat = torch.tensor([b * length + p for b, i in enumerate(part) for p in positions[i]])  # [M]
                device = model.model.device
                yield part, model(batch.to(device), flat.to(device)).float()
    finally:
        model.train(was_training)
