"""Masked language models of many architectures at toy size, with batches and tokenizers for them."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from mlm.model.sparse_head import SparseMaskedLM

VOCAB = 100

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}

ARCHITECTURES = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": {},
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "esm": {"mask_token_id": 4, "token_dropout": True, "position_embedding_type": "rotary"},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 2},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    "mpnet": {},
    "roberta": {},
    "roformer": {"embedding_size": 16},
    "xlm-roberta": {},
}


def small_model(model_type: str, **changes) -> PreTrainedModel:
    names = CONFIG_MAPPING[model_type].attribute_map  # DistilBERT says dim where the others say hidden_size
    common = {k: v for k, v in SMALL.items() if names.get(k, k) not in ARCHITECTURES[model_type]}
    config = CONFIG_MAPPING[model_type](**(common | ARCHITECTURES[model_type] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config)
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


ONE_LENGTH = {  # each takes 16 tokens in training
    "nystromformer": {"segment_means_seq_len": 16, "num_landmarks": 4, "conv_kernel_size": 5},
    "reformer": {
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 16),
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "num_buckets": 4,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"],
        "is_decoder": False,
    },
}


def one_length_model(model_type: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**(SMALL | ONE_LENGTH[model_type]))
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config)


def batch(rows: int = 3, length: int = 12, masked: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids [rows, length], sorted positions [masked] and targets [masked]."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    positions = torch.randperm(rows * length, generator=generator)[:masked].sort().values
    targets = input_ids.flatten()[positions]
    input_ids.view(-1)[positions[::2]] = 4  # half of the masked positions show a mask token
    return input_ids, positions, targets


def losses(
    model: SparseMaskedLM,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cross entropy [M] float32 at the positions, as training and evaluation take it."""
    logits = model(input_ids, positions, attention_mask)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def tokenizer_of(size: int = VOCAB) -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(size - len(specials)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
