"""Losses and gradients that are not finite: which step, which chunks, and the documents they came from."""

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from mlm.data.token_store import TokenStore
from mlm.data.tokenizer import readable
from mlm.engine.update import Update
from mlm.errors import one_line

OPENING = 30  # tokens of the first document that a message quotes


class NonFinite(NamedTuple):
    split: str  # or the name of the replay
    chunks: list[int]  # of it
    documents: list[int]  # those that the chunks came from, by their number in the token store
    alone: bool  # whether each of them shows it alone, or only the whole batch together, with dropout's draws

    def message(self, step: int, store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> str:
        start, end = store.document_offsets[self.documents[0] : self.documents[0] + 2]
        opening = readable(tokenizer, store.ids[start : min(end, start + OPENING)])
        which = "chunk" if self.alone else "no chunk shows it alone: all of"
        return (
            f"step {step + 1}: the loss or its gradient is not finite, so that no update was made; {which} "
            f"{one_line(str(self.chunks)[1:-1], 60)} of the {self.split} split, from document "
            f"{one_line(str(self.documents)[1:-1], 60)} (the first begins {one_line(opening, 60)!r}); "
            "earlier checkpoints are good; lower --learning_rate, or leave out the cause"
        )


def find_nonfinite(update: Update, step: int, stores: dict[str, TokenStore]) -> NonFinite:
    """The chunks of a step, of one source, whose loss or gradient, alone, without dropout, is not finite; or all."""
    model, batches = update.model, update.batches
    model.eval()
    chunk_ids, epochs = batches.places(step)
    broken = []
    for row in range(len(chunk_ids)):
        loss, _ = update.loss(batches.mask(step, chunk_ids[row : row + 1], epochs[row : row + 1]))
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        broken.append(not (loss + torch.nn.utils.get_total_norm(gradients)).isfinite())
    chunk_ids = chunk_ids[broken] if any(broken) else chunk_ids
    source, ids_there = batches.mixture.locate(chunk_ids)
    split, own = ("train", *batches.shares)[source.min()], ids_there[source == source.min()]
    documents = batches.mixture.sources[source.min()].documents(own, stores[split].document_offsets)
    return NonFinite(split, own.tolist(), documents.tolist(), any(broken))
