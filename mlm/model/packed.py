"""Rows of several documents that do not see one another, in the terms of transformers' architectures.

documents         1 1 1 2 2 0      of the tokens of a row; 0: padding
position ids      0 1 2 0 1 0      in RoBERTa 2 3 4 2 3 2, as they begin after the padding's id
attention mask    0 0 0 - - -      of the first token; -: the least float. A boolean mask would be added as 0 and 1."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mlm.model.vocabulary import max_positions


def apart(model: PreTrainedModel, documents: Tensor) -> dict[str, Any]:
    """What `model` is given beside its input ids, so that no token sees another document's. documents: int32 [B, T]"""
    device, config, kind = documents.device, model.config.get_text_config(), documents.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    same, least = documents[:, :, None] == documents[:, None, :], torch.finfo(dtype).min  # [B, T, T]
    mask: Any = torch.zeros(same.shape, dtype=dtype, device=device).masked_fill(~same, least)[:, None]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):  # ModernBERT
        column = torch.arange(documents.shape[1], device=device)
        far = (column[:, None] - column).abs() > config.sliding_window
        mask = {"full_attention": mask, "sliding_attention": mask.masked_fill(far, least)}
    first = config.max_position_embeddings - longest if (longest := max_positions(config)) else 0
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters  # RoFormer's are relative
    return {"attention_mask": mask} | ({"position_ids": first + same.tril(-1).sum(-1)} if takes_positions else {})
