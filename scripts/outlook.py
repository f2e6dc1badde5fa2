"""What can be known before a run: how well the tokenizer knows the text, and the base its content; how much there is.

The loss is that of fixed masks on the openings of DOCUMENTS held-out documents, one by one, as a run measures them.
Beside it stands what came of the recorded run (benchmarks/outlook.py) that is most like this one.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from mlm.config import Config
from mlm.data.token_store import TokenStore
from mlm.data.tokenizer import TokenizerInfo, spell
from mlm.errors import printable
from mlm.evaluation.compare import EVAL_SETS
from mlm.evaluation.eval_set import EvalSet, one_by_one, open_eval_sets
from mlm.evaluation.evaluate import evaluate
from mlm.figures import figure, finite
from mlm.model.load import load_trained, position_limit

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results" / "outlook.json"
DOCUMENTS = 50  # that the base is measured on; words are counted in twenty times as many
CUT = 12  # words
ALIKE = 10  # a recorded run whose tokens a parameter or perplexity differ by a larger factor says nothing of this one


def outlook(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    stores: dict[str, TokenStore],
    length: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The figures, printed as they are found. length: of a chunk

    config: its out_of_domain is what to compare with, if any; its model is measured if it is a checkpoint
    Raises UserError where the out-of-domain text cannot be read.
    """
    store, cut = stores.get("train", stores["validation"]), {}
    sample = replace(config.evaluate, max_eval_samples=DOCUMENTS)
    eval_sets = open_eval_sets(replace(config, evaluate=sample), tokenizer, info, stores["validation"], length)
    found: dict[str, Any] = {"pieces_a_word": pieces_a_word(store), "unknown_token_share": unknown_share(store)}
    if other := eval_sets.get("out_of_domain"):
        found |= {"out_of_domain_pieces_a_word": pieces_a_word(other.store)}
        found |= {"out_of_domain_unknown_token_share": unknown_share(other.store)}
    print("\nbefore a run")
    for name, title in (("pieces_a_word", "pieces a word"), ("unknown_token_share", "unknown tokens")):
        own, beside = found[name], found.get(f"out_of_domain_{name}")
        print(f"  {title:<22} {figure(own)}" + (f", in out-of-domain text {figure(beside)}" if other else ""))
    if cut := most_cut(store, tokenizer, info):
        found["words_cut_most"] = cut
        print(f"  {'words cut most':<22} {printable(', '.join(cut))}")
    if config.model.model_name_or_path:
        found |= measured(config, tokenizer, eval_sets, store, accelerator)
    return found


def pieces_a_word(store: TokenStore) -> float | None:
    """None where the tokenizer sees no words."""
    return None if store.why_no_words else store.mean_word


def unknown_share(store: TokenStore) -> float:
    """Of all tokens."""
    return store.header["unknown_tokens"] / max(store.header["tokens"], 1)


def most_cut(store: TokenStore, tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> list[str]:
    """The words, in pieces, that cost most tokens beyond one each, in a sample of documents."""
    if store.why_no_words:
        return []
    documents, words = store.header["documents"], Counter()
    chosen = np.random.default_rng(0).choice(documents, min(documents, 20 * DOCUMENTS), replace=False)
    for start, end in zip(store.document_offsets[chosen], store.document_offsets[chosen + 1], strict=True):
        ids, starts = store.ids[start:end], store.word_starts[start:end]
        for word in np.split(ids, np.flatnonzero(starts)[1:]):
            if len(word) > 1 and info.maskable[word].all():
                words[tuple(word.tolist())] += len(word) - 1
    return [" ".join(spell(tokenizer, [piece]) for piece in word) for word, _ in words.most_common(CUT)]


def measured(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    eval_sets: dict[str, EvalSet],
    store: TokenStore,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The base's perplexity on the texts and its spread over documents, and the tokens a parameter; printed."""
    model = load_trained(config.model, tokenizer, accelerator.device, eval_sets["held_out"].chunks.chunk_size)
    parameters = sum(p.numel() for p in model.parameters())
    seen = (config.train.max_train_samples or math.inf) * eval_sets["held_out"].chunks.chunk_size
    found: dict[str, Any] = {"tokens_a_parameter": min(store.header["tokens"], seen) / parameters}
    print(f"  {'tokens a parameter':<22} {figure(found['tokens_a_parameter'])}, of {parameters:,} parameters")
    for name, eval_set in eval_sets.items():
        prefix, _ = EVAL_SETS[name]
        whole = one_by_one(eval_set, config.chunks, config.model, position_limit(config.model))
        evaluation = evaluate(model, whole or eval_set, accelerator)
        _, row = np.unique(evaluation.chunk, return_inverse=True)
        own = np.exp(np.bincount(row, evaluation.nats) / np.bincount(row))
        found[f"{prefix}perplexity"] = evaluation.perplexity
        low, middle, high = np.quantile(own, [0.1, 0.5, 0.9]).tolist()
        found[f"{prefix}perplexity_of_documents"] = [low, middle, high]
        rows = "documents" if whole else "chunks"
        print(
            f"  {prefix.replace('_', ' ') + 'perplexity':<22} {figure(evaluation.perplexity)}, {rows} one by one; of "
            f"four in five {figure(low)} to {figure(high)}"
        )
    print(f"  {expected(found)}")
    return finite(found)


def expected(found: dict[str, Any]) -> str:
    """A sentence on what to expect: what came of the recorded run that is most like this one."""
    if not RECORDS.is_file() or not 0 < found["perplexity"] < math.inf:
        return "there is no recorded run to compare with"
    records = json.loads(RECORDS.read_text())["runs"]
    keys = ("tokens_a_parameter", "perplexity")

    def unlike(record: dict[str, Any]) -> float:
        return max(abs(math.log(record[key] / found[key])) for key in keys)

    near = min(records, key=unlike)
    if unlike(near) > math.log(ALIKE):
        return f"none of {len(records)} recorded runs has tokens a parameter and a perplexity like these"
    low, high = near["gain_interval"]
    task = ""
    if own := near["classifier"]:
        difference, least, most = (figure(100 * share) for share in (own["difference"], *own["interval"]))
        task = f", and a classifier of its features gained {difference} points ({least} to {most})"
    return (
        f"of {len(records)} recorded runs the one most like it ({near['what']}: {figure(near['tokens_a_parameter'])} "
        f"tokens a parameter, perplexity {figure(near['perplexity'])}) divided the perplexity by "
        f"{figure(near['gain'])} ({figure(low)} to {figure(high)}) in one epoch{task}"
    )
