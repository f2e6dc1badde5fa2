"""The sizes of a model's position and embedding tables, and how the embeddings grow."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mlm.errors import UserError, one_line

# Architectures whose position ids start after the padding id, as RoBERTa's do: no token uses the first
# pad_token_id + 1 rows of the position table.
POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
OF_ONE_LENGTH = ("nystromformer", "reformer")  # architectures that train on sequences of one length


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that the model's position table takes; None: it needs none, as rotary ones."""
    config = config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) is not None
    rotary |= getattr(config, "position_embedding_type", None) == "rotary"  # ESM-2
    relative = not getattr(config, "position_biased_input", True)  # DeBERTa without absolute positions
    rows = None if rotary or relative else getattr(config, "max_position_embeddings", None)
    if rows is None or config.model_type not in POSITIONS_AFTER_PADDING:
        return rows
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id  # a constant in MPNet's code
    return rows - padding - 1


def check_encoder(model: PreTrainedModel) -> None:
    """Raises UserError where `model` has no encoder that reads texts of any length by itself."""
    if model.config.model_type in OF_ONE_LENGTH or model.base_model is model:
        raise UserError(f"{type(model).__name__} has no encoder that reads texts of any length: no --task_file")


def only_length(config: PreTrainedConfig) -> int | None:
    """The one length of sequences, in tokens, that a Nystromformer takes, whose landmarks are the means of equal
    segments of a sequence of that length (Xiong et al. 2021, arXiv:2102.03902); None for other architectures."""
    if config.model_type != "nystromformer" or config.num_landmarks == config.segment_means_seq_len:
        return None
    return config.segment_means_seq_len


def enlarge(model: PreTrainedModel, rows: int) -> None:
    """Enlarges the token embeddings and the head. Raises UserError where the architecture cannot."""
    model.resize_token_embeddings(rows)
    try:
        with torch.no_grad():  # on a copy, as in SparseMaskedLM
            copy.deepcopy(model).eval()(input_ids=torch.full((1, 8), rows - 1))
    except RuntimeError as error:  # ESM's head keeps a bias of the old size
        reason = f"{type(model).__name__}: the embeddings cannot grow to the tokenizer's {rows} rows"
        raise UserError(f"{reason}; use the checkpoint's own tokenizer ({one_line(error)})") from error


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that the embedding table needs: the largest id + 1, more than `len(tokenizer)` with gaps."""
    return max(tokenizer.get_vocab().values()) + 1
