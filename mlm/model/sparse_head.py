"""A masked language model whose head runs on the masked positions alone.

About 15% of the positions carry loss, and the projection to the vocabulary is a large part of a small
model's work, so `SparseMaskedLM` hands the model's own head the hidden states of those positions only. It
does so with one forward hook on the encoder, whatever the architecture, and checks at the start that it fits.
"""

import copy
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlm.errors import listed, one_line
from mlm.model.seeded import seeded_cpu_generator

log = logging.getLogger(__name__)


class SparseMaskedLM(nn.Module):
    """A masked language model whose head runs on chosen positions only.

    While `forward` runs, a hook on the model's encoder replaces its last hidden state `[B, T, H]`
    by the rows of the positions, `[1, M, H]`, so that the model's own head, whatever it is, works on M rows
    instead of B·T. Called on its own, `model` is what it was.

    At construction a copy of the model takes two short sequences with the sparse head and with the dense one:
    - where the logits do not agree, the dense head is used, `sparse` is False, and a warning says so;
    - parameters that the loss gives no gradient (poolers, heads for other tasks) are frozen. Every parameter
      left has a gradient in every step, all zero where no position is masked: a process with an empty share
      then has the same gradients to reduce as the others, as DistributedDataParallel requires.
    Working on a copy (parameters and gradients, for a moment) keeps the model's buffers, gradients and
    switches, such as BigBird's, which turns to full attention for good when it sees a short sequence.

    Attributes:
        model: the model itself, which is what to save.
        sparse: whether the head runs on the masked rows alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.sparse = True
        self._positions: Tensor | None = None  # [M], while a sparse forward pass runs
        hook = model.base_model.register_forward_hook(self._keep_positions)

        twin, batch = copy.deepcopy(self).eval(), _probe_batch(model)
        with seeded_cpu_generator(0):  # Reformer's hashing draws in evaluation too
            if misfit := _misfit(twin, *batch):
                self.sparse = twin.sparse = False
                hook.remove()
                log.warning("%s: the head runs on all positions, as %s", type(model).__name__, misfit)
            _freeze(model, _without_gradient(twin, *batch))
        del twin.model  # the hook leads back to its owner: only the collector would find the two, some time

    def forward(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits at the given positions.

        Args:
            input_ids: int64 `[B, T]`, the corrupted chunks, B ≥ 1.
            positions: int64 `[M]`, positions in the flattened batch, in [0, B·T); M may be 0.
            attention_mask: int64 or bool `[B, T]`, zero at padding; None where there is no padding.

        Returns:
            `[M, V]`, in the dtype of the model's head: bfloat16 under bf16 autocast, in which a cross entropy
            loses whole nats, so widen first: `F.cross_entropy(logits.float(), targets, reduction="none")`.
            For M = 0 the sum is a zero that can be differentiated.
        """
        padding = {} if attention_mask is None else {"attention_mask": attention_mask}
        self._positions = positions if self.sparse else None
        try:
            logits = self.model(input_ids=input_ids, **padding).logits  # [1, M, V], or dense [B, T, V]
        finally:
            self._positions = None
        return logits[0] if self.sparse else _rows(logits, positions)

    def _keep_positions(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """The hook: the encoder's output with the last hidden state cut to the rows of the positions."""
        if self._positions is None:
            return None
        rows = _rows(output[0], self._positions).unsqueeze(0)  # [B, T, H] -> [1, M, H]
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output["last_hidden_state"] = rows
        return output


def _rows(states: Tensor, positions: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, positions)  # [B, T, X], [M] -> [M, X]


def _probe_batch(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Input ids [2, 8] and positions [5]: a fixed batch without special tokens."""
    config = model.config.get_text_config()
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    special = {getattr(config, f"{kind}_token_id", None) for kind in kinds}
    maskable = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    drawn = torch.randint(len(maskable), (2, 8), generator=torch.Generator().manual_seed(0))
    return maskable[drawn].to(model.device), torch.tensor([1, 4, 6, 10, 15], device=model.device)


@torch.no_grad()
def _misfit(twin: SparseMaskedLM, input_ids: Tensor, positions: Tensor) -> str | None:
    """Why the sparse head does not give the dense head's logits; None where it does."""
    if twin.model.base_model is twin.model:
        return "it has no encoder apart from its head"
    try:
        sparse = twin(input_ids, positions)
        twin(input_ids, positions[:0])
        dense = _rows(twin.model(input_ids=input_ids).logits, positions)
    except Exception as error:  # whatever a model raises on a hidden state of another shape, it does not fit
        return f"the sparse head fails with {type(error).__name__}: {one_line(error)}"
    if sparse.shape != dense.shape:
        return f"the sparse logits have the shape {tuple(sparse.shape)} instead of {tuple(dense.shape)}"
    # The two differ by the order of summation; a wrong row differs by as much as the logits themselves.
    tolerance = torch.finfo(dense.dtype).eps ** 0.5 * dense.abs().max()
    if not (sparse - dense).abs().max() <= tolerance:
        return "the sparse logits differ from the dense ones"
    return None


def _without_gradient(twin: SparseMaskedLM, input_ids: Tensor, positions: Tensor) -> list[str]:
    """Names of the trainable parameters of the model that a loss of the logits does not reach."""
    try:
        with torch.enable_grad():
            twin(input_ids, positions).float().sum().backward()
    except Exception as error:  # Reformer takes gradients at one sequence length only
        reason = one_line(f"{type(error).__name__}: {error}")
        log.warning("no parameter is frozen, as the trial step fails with %s", reason)
        return []
    return [name for name, p in twin.model.named_parameters() if p.requires_grad and p.grad is None]


def _freeze(model: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if names:
        log.info("frozen, as the masked-LM loss does not reach them: %s", listed(names))
