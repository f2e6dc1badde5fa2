"""Pseudo-perplexity: each token of a sentence is predicted with it alone masked, one after the other.

Salazar et al. 2020, "Masked Language Model Scoring" (arXiv:1910.14659), their PLL and PPPL:

    PLL(W) = Σ_t log P(w_t | W without w_t)        PPPL = exp(−Σ_W PLL(W) / N), N tokens in all

Special tokens are neither predicted nor counted in N. Nor are unknown ones; their number is reported, and bits per
character and per word count them as `unknown_bits` does. A literal `[MASK]` in a sentence is text.

The product of these conditionals is no probability of the text. PPPL compares models of one tokenizer only. Bits per
character and per word (separated by blanks), −Σ PLL / (ln 2 · their number), come nearer to a comparison across
tokenizers, but a word in several pieces is guessed from its own pieces (Kauf and Ivanova 2023, arXiv:2305.10588)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from mlm.data.encode import encode_texts
from mlm.data.tokenizer import tokenizer_info
from mlm.errors import one_line
from mlm.evaluation.evaluate import unknown_bits
from mlm.figures import exp_or_inf, mean
from mlm.model.predict import check_length, cross_entropy, same_length, without_dropout
from mlm.model.sparse_head import SparseMaskedLM


@dataclass(frozen=True)
class Scores:
    """A model's scores of n sentences."""

    log_likelihoods: np.ndarray  # [n] float64, PLL in nats
    tokens: np.ndarray  # [n] int64, tokens that were predicted
    unknown: np.ndarray  # [n] int64, unknown tokens, which were not
    characters: np.ndarray  # [n] int64, code points, blanks around the sentence left out
    words: np.ndarray  # [n] int64, separated by blanks

    def summary(self) -> dict[str, float]:
        """The totals; NaN without tokens."""
        total, tokens = float(self.log_likelihoods.sum()), int(self.tokens.sum())
        unknown, characters = int(self.unknown.sum()), int(self.characters.sum())
        bits = -total / math.log(2) + unknown_bits(tokens, unknown, characters) if tokens else math.nan
        return {
            "pseudo_perplexity": exp_or_inf(mean(-total, tokens)),
            "pseudo_log_likelihood": total,
            "tokens": tokens,
            "unknown_tokens": unknown,
            "bits_per_character": bits / characters,
            "bits_per_word": bits / int(self.words.sum()),
        }


@torch.inference_mode()
def score(
    model: SparseMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    sentences: dict[int, str],
    batch_size: int,
    accelerator: Accelerator,
) -> Scores:
    """Scores the sentences, {line: sentence}, in their order. Several processes share the batches.

    batch_size: masked copies of sentences at a time; no figure depends on it

    Raises UserError, naming the line, where a sentence is longer than the model's position table."""
    info = tokenizer_info(tokenizer)
    rows = list(encode_texts(sentences.values(), tokenizer, info))
    for (line, sentence), row in zip(sentences.items(), rows, strict=True):
        check_length(model, f"line {line} ({one_line(sentence, 60)!r})", row)
    places = [np.flatnonzero(~info.special[row]) for row in rows]
    tokens = np.array([len(place) for place in places])
    whose, place = np.repeat(np.arange(len(rows)), tokens), np.concatenate(places)  # [copies] sentence, masked token
    nats = torch.zeros(len(whose), device=accelerator.device)  # zero where another process predicts
    with without_dropout(model), accelerator.autocast():
        batches = same_length([rows[i] for i in whose], batch_size)
        for part in list(batches)[accelerator.process_index :: accelerator.num_processes]:
            batch = torch.from_numpy(np.stack([rows[i] for i in whose[part]]))  # [B, T]
            positions = torch.arange(len(batch)) * batch.shape[1] + torch.from_numpy(place[part])  # [B]
            targets = batch.view(-1)[positions].to(accelerator.device)
            batch.view(-1)[positions] = info.mask_id
            nats[part] = cross_entropy(model(batch.to(accelerator.device), positions.to(accelerator.device)), targets)
    nats = accelerator.reduce(nats).cpu().double().numpy()  # the device synchronises here
    texts = [sentence.strip() for sentence in sentences.values()]
    unknown = [(row == info.unknown_id).sum() for row in rows]
    sizes = ([len(text) for text in texts], [len(text.split()) for text in texts])
    return Scores(-np.bincount(whose, nats, len(rows)), tokens, *map(np.array, (unknown, *sizes)))
