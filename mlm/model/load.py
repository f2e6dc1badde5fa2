"""A masked language model in float32 on the CPU: a checkpoint, or a fresh one."""

import copy
import difflib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as KNOWN

from mlm.data.token_store import TokenStore, limit_threads, prepare, store_folder
from mlm.data.tokenizer import TokenizerInfo, corpus_tokenizer, load_tokenizer, tokenizer_info
from mlm.errors import UserError, explain_load_failure, in_words_of, listed, one_line
from mlm.hub import local_files_only, no_bars
from mlm.model.sparse_head import SparseMaskedLM, seeded_cpu_generator
from mlm.model.vocabulary import enlarge, max_positions, only_length, vocab_size

log = logging.getLogger(__name__)

# A BERT that learns more than token frequencies within minutes on two CPU cores: sooner with fresh weights of standard
# deviation 0.05 than with the usual 0.02, which suits wider models.
DEMO = {
    **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    **{"vocab_size": 8192, "max_position_embeddings": 128, "initializer_range": 0.05},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
MOST_LAYERS = 10_000
MOST_UNKNOWN = 0.01  # of the tokens: from there on it is said, and figures per character mean nothing


@dataclass(frozen=True)
class ModelConfig:
    """Which model to train or measure. Without a name or a type it is the demo model."""

    model_name_or_path: str | None = None  # Start from this checkpoint, a Hub name or a folder.
    config_name: str | None = None  # Train this configuration from scratch, or load the checkpoint with it.
    model_type: str | None = None  # Train this architecture from scratch, at its default size (modernbert).
    tokenizer_name: str | None = None  # Use this tokenizer if it differs from the model's.
    trust_remote_code: bool = False  # Run the Python code that a checkpoint brings along.
    gradient_checkpointing: bool = False  # Train in less memory and more time, if one chunk does not fit.
    dropout: float | None = None  # Replace all dropout probabilities of the model by this one, for this run.

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} is no dropout probability: give one in [0, 1)")

    @property
    def is_demo(self) -> bool:
        return not (self.model_name_or_path or self.config_name or self.model_type)


@no_bars()
def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Loads the checkpoint that `config` names, or initialises a model from scratch, in float32 on the CPU.

    New weights (of a model from scratch, missing in the checkpoint, of tokens that it does not know) are drawn from
    `seed`; the global generators keep their state. The embeddings grow where the tokenizer is larger. The modules use
    `config.dropout`, while `model.config`, which `save_pretrained` writes, keeps the model's own probabilities. From
    scratch, the configuration has the tokenizer's size and special ids.

    Raises UserError where the checkpoint or configuration cannot be read, is not of a masked language model over
    tokens, needs `trust_remote_code`, or lacks the gradient checkpointing that `config` asks for."""
    arch = model_config(config)
    if not config.model_name_or_path:
        text = arch.get_text_config()
        text.vocab_size = vocab_size(tokenizer)
        for kind in ("pad", "bos", "eos", "cls", "sep", "mask"):
            if hasattr(text, f"{kind}_token_id"):
                setattr(text, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    own_dropout = [] if config.dropout is None else _set_dropout(arch, itertools.repeat(float(config.dropout)))
    with seeded_cpu_generator(seed):
        model = _build(config, arch)
        table = getattr(model.get_input_embeddings(), "weight", None)
        if table is None:  # Perceiver's latents
            raise UserError(f"{type(model).__name__} has no table of token embeddings; choose another architecture")
        rows, needed = len(table), vocab_size(tokenizer)
        if needed > rows:
            log.warning("the embeddings grow from %d to %d rows: the tokenizer has more tokens", rows, needed)
            enlarge(model, needed)

    if config.gradient_checkpointing:  # keeps each layer's input, recomputes the rest in backward (Chen et al. 2016)
        # New versions of transformers have the first name and warn about the second, which old ones have.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})  # a layer used several times gets one gradient, complete
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {one_line(error)}") from error
    if own_dropout:
        # Modules share the configuration that they were built from, and some read it in every forward pass.
        model.config = copy.deepcopy(model.config)
        _set_dropout(model.config, iter(own_dropout))
    return model


def load_trained(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device | str, length: int | None = None
) -> SparseMaskedLM:
    """The checkpoint that `config` names, on `device`, for sequences of `length` tokens, or of any (None). Raises
    UserError as `load_model` does, where the model takes no such sequences, and for ids beyond its embeddings: rows
    added to them mean nothing before training."""
    rows, needed = getattr(model_config(config).get_text_config(), "vocab_size", None), vocab_size(tokenizer)
    if rows is not None and needed > rows:
        reason = f"the tokenizer's ids go up to {needed - 1}, the model's embedding table has {rows} rows"
        raise UserError(f"{config.model_name_or_path}: {reason}; use the tokenizer that the model was trained with")
    model = load_model(config, tokenizer, seed=0)
    only = only_length(model.config)
    if only not in (None, length):
        takes = f"{config.model_name_or_path}: {type(model).__name__} takes sequences of {only} tokens only"
        raise UserError(f"{takes}; evaluate it on a text with --max_seq_length {only} and --pad_to_max_length true")
    return SparseMaskedLM(model, only).to(device)


def model_config(config: ModelConfig) -> PreTrainedConfig:
    """The unchanged configuration of the name or type in `config`, or of the demo model. Raises UserError where that
    is none of a masked language model."""
    if config.is_demo:
        return AutoConfig.for_model("bert", **DEMO)
    if source := config.config_name or config.model_name_or_path:
        code = {"trust_remote_code": config.trust_remote_code, "local_files_only": local_files_only(source)}
        try:
            arch = AutoConfig.from_pretrained(source, **code)
        except Exception as error:  # missing, damaged, unsafe, in need of a package
            raise explain_load_failure("model", source, error) from error
        if arch.model_type not in KNOWN and "AutoModelForMaskedLM" not in (getattr(arch, "auto_map", None) or ()):
            raise UserError(f"{source}: a model of type {arch.model_type} is no masked language model")
        layers = getattr(arch.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise UserError(f"{source}: {layers:,} layers; at most {MOST_LAYERS:,}")
        return arch
    if config.model_type not in KNOWN:
        near = difflib.get_close_matches(config.model_type, KNOWN, n=5) or sorted(KNOWN)
        none = f"--model_type {config.model_type}: transformers has no masked language model of this name"
        raise UserError(f"{none}; it has {', '.join(near)}")
    return AutoConfig.for_model(config.model_type)


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model by its configuration and the mean size of its weights, to six digits. Not by their bits:
    those of fresh weights may depend on the kind of processor that drew them."""
    described = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
    size = sum(p.detach().abs().sum(dtype=torch.float64).item() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} {digest}, {count:,} weights of mean size {size / count:.6g}"


def position_limit(config: ModelConfig) -> int | None:
    """`max_positions` of the model that `config` names, not loaded; from scratch, at its default padding id."""
    return max_positions(model_config(config))


def open_corpus(config: Any) -> tuple[PreTrainedTokenizerBase, TokenizerInfo, dict[str, TokenStore]]:
    """The tokenizer, named or else trained on the corpus, its info, and the token store of each split. Call this
    before the process's first use of a tokenizer, as it sets the number of threads.

    config: a mlm.config.Config. Warns where over MOST_UNKNOWN of a split's tokens are unknown. Raises UserError where
    no token of a split may be masked."""
    limit_threads(config.token_store)
    if name := config.model.tokenizer_name or config.model.model_name_or_path:
        tokenizer = load_tokenizer(name, config.model.trust_remote_code)
    else:
        size, kept = model_config(config.model).get_text_config().vocab_size, config.token_store
        tokenizer = corpus_tokenizer(config.corpus, size, store_folder(kept))
    info = tokenizer_info(tokenizer)
    settings = config.token_store, config.masking.whole_word_mask
    stores = prepare(config.corpus, tokenizer, info, *settings)
    for name, text in config.replay.texts(config.corpus).items():
        with in_words_of("replay"):
            store = prepare(text, tokenizer, info, *settings, only="validation")["validation"]
        stores[name] = replace(store, header=store.header | {"split": name})
    for split, store in stores.items():
        known, unknown = store.header["maskable_tokens"], store.header["unknown_tokens"]
        share = f"{unknown / max(known + unknown, 1):.1%} of the tokens of the {split} split are unknown"
        if not known and store.header["tokens"]:
            reason = f"to the tokenizer {tokenizer.name_or_path}, and none is left to learn"
            raise UserError(f"{share} {reason}: choose another --tokenizer_name")
        if unknown > MOST_UNKNOWN * (known + unknown):
            never = "they are never predicted, and there are no bits per character or word"
            log.warning("%s to the tokenizer: %s", share, never)
    return tokenizer, info, stores


def _build(config: ModelConfig, arch: PreTrainedConfig) -> PreTrainedModel:
    name, settings = config.model_name_or_path, {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
    try:
        if not name:
            return AutoModelForMaskedLM.from_config(arch, **settings)
        settings |= {"weights_only": True, "local_files_only": local_files_only(name)}  # a pickle may hold no code
        model, loading = AutoModelForMaskedLM.from_pretrained(name, config=arch, output_loading_info=True, **settings)
    except Exception as error:  # such as a division by no heads, or an activation that nobody knows
        if source := name or config.config_name:
            raise explain_load_failure("model", source, error) from error
        raise UserError(f"--model_type {config.model_type}: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        log.warning("%s: newly initialised, as the checkpoint lacks them: %s", name, listed(missing))
    return model


def _set_dropout(config: PreTrainedConfig, values: Iterator[float]) -> list[float]:
    """Takes each dropout probability, nested configurations included, from `values`, and returns what they were. A
    field that is None (BERT's classifier_dropout) follows another one. A boolean one (ESM's token_dropout) is none."""
    replaced = []
    for field, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            replaced += _set_dropout(value, values)
        elif "dropout" in field and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, field, next(values))
            replaced.append(value)
    return replaced
