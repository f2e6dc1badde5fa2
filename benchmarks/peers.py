"""What people prepare masked-language-model batches with today, written down as they have it.

Lists of Python integers between the steps, as Arrow gives them out; `course_recipe.py` has the course's maps.
"""

import os
from collections import defaultdict
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, default_data_collator

from benchmarks.course_recipe import Columns

Feature = dict[str, Any]  # a chunk: column name -> one entry a token


def run_mlm_maps(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int, num_proc: int | None
) -> datasets.Dataset:
    """run_mlm's two maps, tokenise and group: one row a chunk. num_proc: --preprocessing_num_workers."""
    tokenized = documents.map(
        lambda batch: tokenizer(batch["text"], return_special_tokens_mask=True),
        batched=True,
        num_proc=num_proc,
        remove_columns=documents.column_names,
    )
    chunks = tokenized.map(lambda batch: chain_batch(batch, length), batched=True, num_proc=num_proc)
    # Several processes leave tokenizers without threads for whatever is timed next: `map` puts os.environ
    # back, but not the process's own environment, which is where tokenizers looks.
    os.unsetenv("TOKENIZERS_PARALLELISM")
    return chunks


def chain_batch(batch: Columns, length: int) -> Columns:
    """run_mlm's way to join the documents of a map's batch, and to cut them; the end of each is dropped."""
    chunks: Columns = {}
    for name, rows in batch.items():
        joined = list(chain(*rows))
        kept = len(joined) // length * length
        chunks[name] = [joined[start : start + length] for start in range(0, kept, length)]
    return chunks


def tensors(rows: list[list[int]], order: np.ndarray, batch_size: int) -> list[torch.Tensor]:
    """The chunks in this order, [batch_size, T] int64 each (the last one may have fewer rows)."""
    return [
        torch.tensor([rows[index] for index in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    ]


def course_whole_words(
    features: list[Feature], tokenizer: PreTrainedTokenizerBase, probability: float, draws: np.random.RandomState
) -> dict[str, torch.Tensor]:
    """The course's whole-word collator: for each chunk a map from words to their tokens, and a draw a word.

    A chosen word becomes mask tokens throughout. Labels are -100 elsewhere.
    """
    masked = []
    for feature in features:
        words: dict[int, list[int]] = defaultdict(list)
        last = None
        for place, word in enumerate(feature["word_ids"]):
            if word is None:
                continue
            if word != last:
                last = word
                number = len(words)
            words[number].append(place)
        ids, labels = list(feature["input_ids"]), [-100] * len(feature["input_ids"])
        for chosen in np.flatnonzero(draws.binomial(1, probability, len(words))).tolist():
            for place in words[chosen]:
                labels[place] = ids[place]
                ids[place] = tokenizer.mask_token_id
        rest = {name: column for name, column in feature.items() if name != "word_ids"}
        masked.append({**rest, "input_ids": ids, "labels": labels})
    return default_data_collator(masked)
