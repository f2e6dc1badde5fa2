"""A masked language model whose head, a large part of a small model's work, runs on the masked positions alone."""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlm.errors import UserError, listed, one_line
from mlm.model.packed import apart
from mlm.model.vocabulary import only_length

log = logging.getLogger(__name__)

TRIAL = 8  # tokens in a sequence of the trial


@contextmanager
def seeded_cpu_generator(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator and restores its state at the end; `torch.manual_seed` would seed GPUs too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**64)  # any integer, as for the masks
        yield


class SparseMaskedLM(nn.Module):
    """A masked language model whose head runs on chosen positions only.

    While `forward` runs, a hook on the model's encoder replaces its last hidden state `[B, T, H]` by the rows at the
    positions, `[1, M, H]`, so that the model's own head, whatever it is, works on M rows instead of B·T. Called on
    its own, `model` gives its usual dense logits.

    At construction, a copy of the model runs three short sequences with the sparse head and the dense one. Where the
    logits differ, the dense head is used, `sparse` is False, and a warning gives the reason. Parameters that get no
    gradient from the loss (poolers, heads for other tasks) are frozen: every other one then has a gradient in every
    step, all zeros where no position is masked: processes with an empty share need it. A copy, because a forward pass
    may change a model: its buffers, and switches such as BigBird's, which stays at full attention after one short
    sequence.

    model:  the model itself, which is what to save"""

    def __init__(self, model: PreTrainedModel, length: int | None = None, pack: bool = False) -> None:
        """length: of the chunks that the model will be trained on; None where it will not be trained.
        pack:   they are documents that share rows. Where that changes logits, `packs` is False; a warning says why.

        Where the trial fails (Reformer and Nystromformer train at one length), it is repeated at `length`. Raises
        UserError where that fails too; without a length, nothing is frozen."""
        super().__init__()
        self.model, self.packs = model, pack
        self._positions: Tensor | None = None  # [M], while a sparse forward pass runs
        hook = model.base_model.register_forward_hook(self._keep_positions)

        with seeded_cpu_generator(0):  # the trial leaves the global generator as it is
            for trial_length in (TRIAL, length):
                self.sparse, batch = True, _trial_batch(model, trial_length)
                twin = copy.deepcopy(self).eval()
                mixed = pack and _mixed(twin, length or TRIAL)  # first: a short sequence may change the model
                misfit = _misfit(twin, *batch)
                self.sparse = twin.sparse = not misfit
                unreached, failure = _without_gradient(twin, *batch)
                del twin.model  # with the hook a cycle, which only the garbage collector would free
                if not failure or not length:
                    break
        if failure and length:
            only = only_length(model.config)
            if model.config.model_type == "reformer":  # takes other lengths outside of training
                only = math.prod(model.config.axial_pos_shape)
            hint = f"; give --max_seq_length {only} and --pad_to_max_length true" if only else ""
            raise UserError(f"{type(model).__name__} cannot be trained on chunks of {length} tokens{hint} ({failure})")
        if failure:
            log.warning("no parameter is frozen, as the trial step fails with %s", failure)
        if misfit:
            hook.remove()
            log.warning("%s: the head runs on all positions, as %s", type(model).__name__, misfit)
        if mixed:
            self.packs = False
            log.warning("%s: documents are padded, not packed, as %s", type(model).__name__, mixed)
        for parameter in unreached:
            model.get_parameter(parameter).requires_grad_(False)
        if unreached:
            log.info("frozen, as the masked-LM loss does not reach them: %s", listed(unreached))

    def forward(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits at the given positions, `[M, V]`, in the dtype of the model's head.

        input_ids:      int64 `[B, T]`, the corrupted chunks, B ≥ 1
        positions:      int64 `[M]`, in the flattened batch, in [0, B·T); M may be 0: the sum can be differentiated
        attention_mask: int64 or bool `[B, T]`, zero at padding; None where there is no padding; int32: numbers, from
                        1 on, of the documents that share a row. A UserError where `packs` is False

        Under bf16 autocast they are bfloat16, in which a cross entropy loses whole nats: widen them first."""
        padding = {} if attention_mask is None else {"attention_mask": attention_mask}
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            if not self.packs:
                raise UserError(f"{type(self.model).__name__} cannot keep documents apart; leave --pack_documents out")
            padding = apart(self.model, attention_mask)
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
        rows = _rows(output[0], self._positions)[None]  # [B, T, H] -> [1, M, H]
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output["last_hidden_state"] = rows
        return output


def _rows(states: Tensor, positions: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, positions)  # [B, T, X], [M] -> [M, X]


def _trial_batch(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """Input ids [3, length] and positions [5] in the first two rows: a fixed batch without special tokens."""
    config = model.config.get_text_config()
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    special = {getattr(config, f"{kind}_token_id", None) for kind in kinds}
    maskable = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    drawn = torch.randint(len(maskable), (3, length), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([1, length // 2, length - 2, length + 2, 2 * length - 1], device=model.device)
    return maskable[drawn].to(model.device), positions


@torch.no_grad()
def _misfit(twin: SparseMaskedLM, input_ids: Tensor, positions: Tensor) -> str | None:
    """Why the sparse head's logits are not the dense head's; None where they are."""
    if twin.model.base_model is twin.model:
        return "it has no encoder apart from its head"
    try:
        with seeded_cpu_generator(0):  # Reformer hashes at random, in evaluation too
            sparse = twin(input_ids, positions)
        with seeded_cpu_generator(0):
            dense = _rows(twin.model(input_ids=input_ids).logits, positions)
        twin(input_ids, positions[:0])
    except Exception as error:  # whatever a model raises on a hidden state of another shape, it does not fit
        return f"the sparse head fails with {type(error).__name__}: {one_line(error)}"
    if sparse.shape != dense.shape:
        return f"the sparse logits have the shape {tuple(sparse.shape)} instead of {tuple(dense.shape)}"
    return None if _close(sparse, dense) else "the sparse logits differ from the dense ones"


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits differ by the order of summation alone; a wrong row differs by as much as they are large."""
    return bool((ours - theirs).abs().max() <= torch.finfo(theirs.dtype).eps ** 0.5 * theirs.abs().max())


@torch.no_grad()
def _mixed(twin: SparseMaskedLM, length: int) -> str | None:
    """Why two documents and a padding token, in a row of `length`, have other logits than apart; None where they have
    not. The first is as long as can be, for the sake of attention in a window."""
    ids, first = _trial_batch(twin.model, length)[0][:1], length - 3
    documents = torch.tensor([[1] * first + [2, 2, 0]], dtype=torch.int32, device=ids.device)
    ends = torch.tensor([0, first - 1, first, first + 1], device=ids.device)
    try:
        packed = twin(ids, ends, documents)
        alone = torch.cat([twin(ids[:, :first], ends[:2]), twin(ids[:, first:-1], ends[2:] - first)])
    except Exception as error:  # whatever a model raises on a mask of another shape
        return f"it fails with {type(error).__name__}: {one_line(error)}"
    return None if _close(packed, alone) else "documents in one row have other logits than apart"


def _without_gradient(twin: SparseMaskedLM, input_ids: Tensor, positions: Tensor) -> tuple[list[str], str]:
    """The trainable parameters that get no gradient from the logits, and why the step failed, if it did."""
    for training in (False, True):  # Reformer has gradients in training mode only
        twin.train(training).zero_grad()
        try:
            with torch.enable_grad():
                twin(input_ids, positions).float().sum().backward()
            return [n for n, p in twin.model.named_parameters() if p.requires_grad and p.grad is None], ""
        except Exception as error:  # whatever a model raises on a sequence of a length that it does not take
            failure = one_line(f"{type(error).__name__}: {error}")
    return [], failure
