"""Losses and gradients that are not finite: which step, which chunks, and the documents they came from."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from mlm.data.token_store import TokenStore
from mlm.errors import one_line

if TYPE_CHECKING:
    from mlm.engine.update import Update

NAMED = 8  # chunks, or documents, that a message names; metrics.jsonl has them all
OPENING = 30  # tokens of the first document that it quotes


class NonFinite(NamedTuple):
    chunks: list[int]
    documents: list[int]  # those that the chunks came from, by their number in the token store
    alone: bool  # whether each of them shows it alone, or only the whole batch together, with dropout's draws

    def message(self, step: int, store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> str:
        start, end = store.document_offsets[self.documents[0] : self.documents[0] + 2]
        opening = tokenizer.decode(store.ids[start : min(end, start + OPENING)], skip_special_tokens=True)
        which = "chunk" if self.alone else "no chunk shows it alone: all of"
        return (
            f"step {step + 1}: the loss or its gradient is not finite, so that no update was made; {which} "
            f"{_some(self.chunks)} of the training split, from document {_some(self.documents)} (the first begins "
            f"{one_line(opening, 60)!r}); earlier checkpoints are good; lower --learning_rate, or leave out the cause"
        )


def find_nonfinite(update: "Update", step: int, store: TokenStore) -> NonFinite:
    """The chunks of a step's global batch whose loss or gradient is not finite, one by one under its masks.

    All of the batch where no chunk shows it alone, without dropout. Each process looks at all: none has to ask.
    """
    model, batches, accelerator = update.model, update.batches, update.accelerator
    model.eval()
    chunk_ids, epochs = batches.places(step)
    broken = []
    for row in range(len(chunk_ids)):
        batch = batches.mask(step, chunk_ids[row : row + 1], epochs[row : row + 1]).to(accelerator.device)
        with accelerator.autocast():
            returned = update.objective(model, batch)
        loss = returned[0] if isinstance(returned, tuple) else returned
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        broken.append(not (loss + torch.nn.utils.get_total_norm(gradients)).isfinite())
    chunk_ids = chunk_ids[broken] if any(broken) else chunk_ids
    documents = batches.chunks.documents(chunk_ids, store.document_offsets)
    return NonFinite(chunk_ids.tolist(), documents.tolist(), any(broken))


def _some(numbers: list[int]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return ", ".join(map(str, numbers[:NAMED])) + more
