"""Pseudo-perplexity: each token of a sentence is predicted with it alone masked, one after the other.

Salazar et al. 2020, "Masked Language Model Scoring" (arXiv:1910.14659), their PLL and PPPL:

    PLL(W) = Σ_t log P(w_t | W without w_t)        PPPL = exp(−Σ_W PLL(W) / N), N tokens in all

Special tokens are neither predicted nor counted in N. Nor are unknown ones, which say nothing about the word that
stood there; their number is reported. A literal `[MASK]` in a sentence is text.

It is not a perplexity of the text, because the product of these conditionals is not a probability of it. PPPL is per
token, so it compares models of one tokenizer only. Bits per character and per word (separated by blanks),
−Σ PLL / (ln 2 · their number), come nearer to a comparison across tokenizers, but a word in several pieces is guessed
from its own pieces, the more easily the more there are (Kauf and Ivanova 2023, arXiv:2305.10588).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from mlm.columns import PAGE, fit
from mlm.data.encode import encode_texts
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.errors import one_line
from mlm.figures import exp_or_inf, finite
from mlm.files import read_sentences
from mlm.model.load import ModelConfig, load_trained
from mlm.model.predict import check_length, same_length, without_dropout
from mlm.model.sparse_head import SparseMaskedLM


@dataclass(frozen=True)
class PseudoPerplexityConfig:
    """Pseudo-perplexity of sentences, in place of the held-out text."""

    pseudo_perplexity: str | None = None  # Score the sentences of this file instead (-: standard input).


@dataclass(frozen=True)
class Scores:
    """A model's scores of n sentences."""

    log_likelihoods: np.ndarray  # [n] float64, PLL in nats
    tokens: np.ndarray  # [n] int64, tokens that were predicted
    unknown: np.ndarray  # [n] int64, unknown tokens, which were not
    characters: np.ndarray  # [n] int64, code points, blanks around the sentence left out
    words: np.ndarray  # [n] int64, separated by blanks

    def summary(self) -> dict[str, float]:
        """The totals; NaN where there is nothing to divide by."""
        total, tokens = float(self.log_likelihoods.sum()), int(self.tokens.sum())
        bits = -total / math.log(2) if tokens else math.nan
        return {
            "pseudo_perplexity": perplexity(total, tokens),
            "pseudo_log_likelihood": total,
            "tokens": tokens,
            "unknown_tokens": int(self.unknown.sum()),
            "bits_per_character": bits / int(self.characters.sum()),
            "bits_per_word": bits / int(self.words.sum()),
        }


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp(−nats a token), NaN without tokens."""
    return exp_or_inf(-log_likelihood / tokens) if tokens else math.nan


@torch.inference_mode()
def score(
    model: SparseMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    sentences: dict[int, str],
    batch_size: int,
    accelerator: Accelerator,
) -> Scores:
    """Scores the sentences, {line: sentence}, in their order.

    batch_size: masked copies of sentences at a time; no figure depends on it. Several processes share the batches.

    Raises UserError, naming the line, where a sentence is longer than the model's position table.
    """
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
            logits = model(batch.to(accelerator.device), positions.to(accelerator.device)).float()
            nats[part] = F.cross_entropy(logits, targets, reduction="none")
    nats = accelerator.reduce(nats).cpu().double().numpy()  # the device synchronises here
    texts = [sentence.strip() for sentence in sentences.values()]
    return Scores(
        log_likelihoods=-np.bincount(whose, nats, len(rows)),
        tokens=tokens,
        unknown=np.array([(row == info.unknown_id).sum() for row in rows]),
        characters=np.array([len(text) for text in texts]),
        words=np.array([len(text.split()) for text in texts]),
    )


def measure(path: str, config: ModelConfig, batch_size: int, accelerator: Accelerator) -> dict[str, Any]:
    """Scores the sentences of a file with the checkpoint that `config` names, and prints a line for each.

    Returns the totals of `Scores.summary`, and `sentences`: for each its line, text, PLL, tokens and PPPL.
    Raises UserError as `read_sentences` and `score` do, and where the checkpoint cannot be loaded.
    """
    sentences = read_sentences(path)
    tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, config.trust_remote_code)
    model = load_trained(config, tokenizer, accelerator.device)
    scores = score(model, tokenizer, sentences, batch_size, accelerator)

    records = []
    accelerator.print(f"{'line':>6} {'tokens':>6} {'PLL, nats':>10} {'PPPL':>9}  sentence")
    totals = zip(scores.log_likelihoods.tolist(), scores.tokens.tolist(), strict=True)
    for (line, text), (nats, tokens) in zip(sentences.items(), totals, strict=True):
        figures = {"pseudo_log_likelihood": nats, "tokens": tokens, "pseudo_perplexity": perplexity(nats, tokens)}
        records.append({"line": line, "text": text, **finite(figures)})
        head = f"{line:>6} {tokens:>6} {nats:>10.2f} {figures['pseudo_perplexity']:>9.4g}  "
        accelerator.print(head + fit(text.strip(), PAGE - len(head)).rstrip())
    summary = scores.summary()
    unknown = summary["unknown_tokens"]
    accelerator.print(
        f"pseudo-perplexity {summary['pseudo_perplexity']:.4g} over {summary['tokens']:,} tokens in "
        f"{len(sentences):,} sentences; {summary['bits_per_character']:.4g} bits a character, "
        f"{summary['bits_per_word']:.4g} a word"
        + (f"; {unknown:,} unknown tokens are in none of these" if unknown else "")
    )
    return {**finite(summary), "sentences": records}
