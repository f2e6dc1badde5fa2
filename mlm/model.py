"""The model: a checkpoint or a fresh one, with a prediction head that runs on the masked positions alone.

About 15% of the positions carry loss, and the projection to the vocabulary is a large part of a small
model's work, so `SparseMaskedLM` hands the model's own head the hidden states of those positions only. It
does so with one forward hook on the encoder, whatever the architecture, and checks at the start that it fits.
"""

import copy
import difflib
import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as KNOWN

from mlm.errors import UserError, explain_load_failure, one_line
from mlm.hub import local_files_only

log = logging.getLogger(__name__)

# Architectures whose position ids start after the padding id, as RoBERTa's do: no token reaches the first
# pad_token_id + 1 rows of the position table.
POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)

DEMO_VOCABULARY = 8192  # tokens
DEMO_POSITIONS = 128

# What a configuration or weights that are missing, damaged or unsafe, or need another package, raise.
UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class ModelConfig:
    """Which model to train or measure. With no name and no type it is the demo model."""

    model_name_or_path: str | None = None  # checkpoint, a Hub name or a folder; none: the demo model
    config_name: str | None = None  # configuration to train from scratch, or to use with the checkpoint
    model_type: str | None = None  # architecture to train from scratch at its default size (modernbert)
    tokenizer_name: str | None = None  # tokenizer, where it differs from the model's
    trust_remote_code: bool = False  # run the Python code that a checkpoint brings along
    gradient_checkpointing: bool = False  # train in less memory and more time: where one chunk does not fit
    dropout: float | None = None  # replaces every dropout probability of the model, in this run only

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} is no dropout probability: give one in [0, 1)")


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Load the checkpoint that `config` names, or initialise a model from scratch, in float32 on the CPU.

    Whatever has to be initialised (a model from scratch, weights that the checkpoint lacks, embeddings of
    tokens that it does not know) is drawn from `seed`; the global generators keep their state. Embeddings
    are enlarged where the tokenizer is larger than them and never made smaller.

    `config.dropout` is a setting of this run: the modules use it, while `model.config`, which
    `save_pretrained` writes, keeps the probabilities that the model came with.

    Raises:
        UserError: the checkpoint or configuration cannot be found, reached or read, is of no masked language
            model, needs `trust_remote_code`, or does not support gradient checkpointing, which is asked for.
    """
    arch = _architecture(config, tokenizer)
    own_dropout = [] if config.dropout is None else list(_dropout_fields(arch))
    for owner, field, _ in own_dropout:
        setattr(owner, field, float(config.dropout))

    with _seeded_cpu_generator(seed):
        build = _from_checkpoint if config.model_name_or_path else _from_scratch
        model = build(config, arch)
        rows, needed = model.get_input_embeddings().weight.shape[0], _vocab_size(tokenizer)
        if needed > rows:
            log.warning("the embeddings grow from %d to %d rows: the tokenizer has more tokens", rows, needed)
            _enlarge(model, needed)

    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    if own_dropout:
        # The modules share the configuration that they were built from, and some read it in every forward
        # pass: a copy, with the probabilities that the model came with, becomes the one that is saved.
        model.config = copy.deepcopy(model.config)
        for (owner, field, _), (_, _, value) in zip(_dropout_fields(model.config), own_dropout, strict=True):
            setattr(owner, field, value)
    return model


def model_config(config: ModelConfig) -> PreTrainedConfig:
    """The configuration of the name or type that `config` gives, one of them at least, as it is.

    Raises UserError where it cannot be loaded, and where it is of no masked language model.
    """
    if source := config.config_name or config.model_name_or_path:
        try:
            arch = AutoConfig.from_pretrained(
                source,
                trust_remote_code=config.trust_remote_code,
                local_files_only=local_files_only(source),
            )
        except UNUSABLE as error:
            raise explain_load_failure("model", source, error) from error
        named_by_remote_code = getattr(arch, "auto_map", None) or ()
        if arch.model_type not in KNOWN and "AutoModelForMaskedLM" not in named_by_remote_code:
            raise UserError(f"{source}: a model of type {arch.model_type} is no masked language model")
        return arch
    if config.model_type not in KNOWN:
        near = difflib.get_close_matches(config.model_type, KNOWN, n=5) or sorted(KNOWN)
        raise UserError(
            f"--model_type {config.model_type}: transformers has no masked language model of this name; "
            f"it has {', '.join(near)}"
        )
    return CONFIG_MAPPING[config.model_type]()


def vocabulary_size(config: ModelConfig) -> int:
    """Tokens of the vocabulary to train for a model that starts from nothing: its default, or the demo's."""
    if config.config_name or config.model_type:
        return model_config(config).get_text_config().vocab_size
    return DEMO_VOCABULARY


def fingerprint(model: PreTrainedModel) -> str:
    """Names a model by its architecture and, to six digits of their mean size, its weights.

    Not by their bits, which fresh weights may owe to the kind of processor that drew them.
    """
    described = {
        k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
    with torch.no_grad():
        size = sum(p.abs().sum(dtype=torch.float64).item() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} {digest}, {count:,} weights of mean size {size / count:.6g}"


def check_embeddings(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer gives ids beyond the embedding table of the named checkpoint.

    To be asked before `load_model`, which enlarges the table for training: a model that is only used knows
    nothing of the rows it would add.
    """
    rows = getattr(model_config(config).get_text_config(), "vocab_size", None)
    largest = _vocab_size(tokenizer) - 1
    if rows is not None and largest >= rows:
        raise UserError(
            f"{config.model_name_or_path}: the tokenizer's ids go up to {largest}, the model's embedding "
            f"table has {rows} rows; use the tokenizer that the model was trained with"
        )


def demo_config(tokenizer: PreTrainedTokenizerBase) -> BertConfig:
    """The configuration of the demo: a BERT that learns more than frequencies in minutes on two CPU cores.

    The default deviation of fresh weights, 0.02, is for wider models: with 0.05 this one learns sooner.
    """
    return BertConfig(
        vocab_size=_vocab_size(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=DEMO_POSITIONS,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that the model's position table takes.

    None where there is no table to run out of: rotary and relative positions.
    """
    config = config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) is not None
    rotary |= getattr(config, "position_embedding_type", None) == "rotary"  # ESM-2
    relative = not getattr(config, "position_biased_input", True)  # DeBERTa without absolute positions
    if rotary or relative:
        return None
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None or config.model_type not in POSITIONS_AFTER_PADDING:
        return rows
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id  # MPNet's is written in its code
    return rows - padding - 1


def position_limit(config: ModelConfig) -> int | None:
    """`max_positions` of the model that `config` names, or of the demo, without loading the model.

    Of one from scratch, at its own padding id: RoBERTa's limit shifts with the tokenizer's.
    """
    if not (config.model_name_or_path or config.config_name or config.model_type):
        return DEMO_POSITIONS
    return max_positions(model_config(config))


class SparseMaskedLM(nn.Module):
    """A masked language model whose head runs on chosen positions only.

    While `forward` or `logits` runs, a hook on the model's encoder replaces its last hidden state `[B, T, H]`
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
        with _seeded_cpu_generator(0):  # Reformer's hashing draws in evaluation too
            if misfit := _misfit(twin, *batch[:2]):
                self.sparse = twin.sparse = False
                hook.remove()
                log.warning("%s: the head runs on all positions, as %s", type(model).__name__, misfit)
            _freeze(model, _without_gradient(twin, *batch))
        del twin.model  # the hook leads back to its owner: only the collector would find the two, some time

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss at each masked position.

        Args:
            input_ids: int64 `[B, T]`, the corrupted chunks, B ≥ 1.
            positions: int64 `[M]`, the masked positions in the flattened batch, in [0, B·T); M may be 0.
            targets: int64 `[M]`, the tokens that stood there.
            attention_mask: int64 or bool `[B, T]`, zero at padding; None where there is no padding.

        Returns:
            nats: float32 `[M]`, the cross entropy at each position, in float32 under autocast too. For
                M = 0 its sum is a zero that can be differentiated.
            hits: bool `[M]`, whether the largest logit is the target's; None in training mode.
        """
        logits = self.logits(input_ids, positions, attention_mask)
        logits = logits.float()  # bf16's argmax is slower on a CPU than widening and float32's
        nats = F.cross_entropy(logits, targets, reduction="none")  # [M, V], [M] -> [M]
        hits = None if self.training else logits.argmax(dim=-1) == targets
        return nats, hits

    def logits(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits `[M, V]` at the positions, in the head's own dtype. Arguments as in `forward`."""
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


def _probe_batch(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids [2, 8], five positions and their targets: a fixed batch of ordinary tokens."""
    config = model.config.get_text_config()
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    special = {getattr(config, f"{kind}_token_id", None) for kind in kinds}
    ordinary = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    drawn = torch.randint(len(ordinary), (2, 8), generator=torch.Generator().manual_seed(0))
    input_ids = ordinary[drawn].to(model.device)
    positions = torch.tensor([1, 4, 6, 10, 15], device=model.device)
    return input_ids, positions, input_ids.flatten()[positions]


@torch.no_grad()
def _misfit(twin: SparseMaskedLM, input_ids: Tensor, positions: Tensor) -> str | None:
    """Why the sparse head does not give the dense head's logits; None where it does."""
    if twin.model.base_model is twin.model:
        return "it has no encoder apart from its head"
    try:
        sparse = twin.logits(input_ids, positions)
        twin.logits(input_ids, positions[:0])
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


def _without_gradient(twin: SparseMaskedLM, *batch: Tensor) -> list[str]:
    """Names of the trainable parameters of the model that the loss does not reach."""
    try:
        with torch.enable_grad():
            nats, _ = twin(*batch)
            nats.sum().backward()
    except Exception as error:  # Reformer takes gradients at one sequence length only
        reason = one_line(f"{type(error).__name__}: {error}")
        log.warning("no parameter is frozen, as the trial step fails with %s", reason)
        return []
    return [name for name, p in twin.model.named_parameters() if p.requires_grad and p.grad is None]


def _freeze(model: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if names:
        log.info("frozen, as the masked-LM loss does not reach them: %s", _listed(names))


def _architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration to build from; without a checkpoint, with the tokenizer's size and special ids."""
    if not (config.model_name_or_path or config.config_name or config.model_type):
        return demo_config(tokenizer)
    arch = model_config(config)
    if not config.model_name_or_path:
        text = arch.get_text_config()
        text.vocab_size = _vocab_size(tokenizer)
        for kind in ("pad", "bos", "eos", "cls", "sep", "mask"):
            if hasattr(text, f"{kind}_token_id"):
                setattr(text, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    return arch


def _from_checkpoint(config: ModelConfig, arch: PreTrainedConfig) -> PreTrainedModel:
    name = config.model_name_or_path
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name,
            config=arch,
            dtype=torch.float32,  # master weights, whatever the checkpoint stores
            weights_only=True,  # a pickle may hold tensors, no code
            trust_remote_code=config.trust_remote_code,
            local_files_only=local_files_only(name),
            output_loading_info=True,
        )
    except UNUSABLE as error:
        raise explain_load_failure("model", name, error) from error
    if missing := sorted(loading["missing_keys"]):
        log.warning("%s: newly initialised, as the checkpoint lacks them: %s", name, _listed(missing))
    return model


def _from_scratch(config: ModelConfig, arch: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForMaskedLM.from_config(
            arch, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    except UNUSABLE as error:
        if config.config_name:
            raise explain_load_failure("model", config.config_name, error) from error
        raise UserError(f"--model_type {config.model_type}: {one_line(error)}") from error


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Training keeps each layer's input alone and computes the rest again in backward (Chen et al. 2016)."""
    # The first is transformers' new name; it warns at the old one, which is all that its older versions have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {one_line(error)}") from error


def _enlarge(model: PreTrainedModel, rows: int) -> None:
    model.resize_token_embeddings(rows)
    try:
        with torch.no_grad():  # on a copy, as in SparseMaskedLM
            copy.deepcopy(model).eval()(input_ids=torch.full((1, 8), rows - 1))
    except RuntimeError as error:  # ESM's head keeps a bias of the old size
        raise UserError(
            f"{type(model).__name__}: the embeddings cannot grow to the tokenizer's {rows} rows; "
            f"use the checkpoint's own tokenizer ({one_line(error)})"
        ) from error


def _listed(names: list[str]) -> str:
    return one_line(f"{len(names)} parameters: {', '.join(names)}", 600)


def _dropout_fields(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str, float]]:
    """(configuration, field, value) of every dropout probability, those of nested configurations included.

    A field that is None (BERT's classifier_dropout) follows another one, and a boolean one (ESM's
    token_dropout, a rescaling of the embeddings) is no probability.
    """
    for field, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _dropout_fields(value)
        elif "dropout" in field and isinstance(value, int | float) and not isinstance(value, bool):
            yield config, field, value


def _vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that the embedding table needs: the largest id + 1, which gaps put above `len(tokenizer)`."""
    return max(tokenizer.get_vocab().values()) + 1


@contextmanager
def _seeded_cpu_generator(seed: int) -> Iterator[None]:
    """Draw weights from `seed` and put the global generator back. Models are built on the CPU, and
    `torch.manual_seed` would also touch the generators of every GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**64)  # any integer is a seed, as it is to the masks
        yield
