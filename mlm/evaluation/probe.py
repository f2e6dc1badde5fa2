"""Whether a task profits: what classifiers learn from the frozen features of two models.

    features      the mean over a document's tokens and its first one ([CLS]), of the last and of the middle layer
    splits        FOLDS folds, and outside of each CHOICES random choices of k labels a class; the same for both models
    classifiers   logistic regression, its penalty chosen inside the training labels, and the nearest neighbours

A document's score is 1 where its class is predicted, else 0; for macro-F1 it is linearised, so that the scores' mean
is the figure. The difference d[s, i] of two models, of choice s and test document i, varies with documents and with
choices. With N documents, R splits, and the share f of its labels that a choice takes of the smallest class, its mean
has the

    variance  Σ (d̄[i] − d̄)² / (N · (N − FOLDS)) + V · (1 / R + f / (1 − f)), d̄ being each fold's own in the sum
    V         variance of d̄[s] over a fold's choices, less the part that comes of d[s, i] − d̄[s] − d̄[i], at least 0

The choices of labels overlap, all the more the larger f is, so that they vary less than labels drawn anew would: the
factor f / (1 − f) makes up for it (Cochran, Sampling Techniques, 1977, ch. 2, on finite populations). The interval is
± Student's t with the degrees of freedom of both terms by Satterthwaite (1946, Biometrics Bulletin 2), at least
FREEDOM. benchmarks/probe.py simulates how often it holds the truth."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.data.encode import encode_texts
from mlm.data.task import Task
from mlm.data.token_store import TokenStore
from mlm.data.tokenizer import tokenizer_info
from mlm.engine.memory import out_of_memory
from mlm.evaluation.interval import student
from mlm.evaluation.retrieval import search
from mlm.model.predict import same_length, without_dropout
from mlm.model.vocabulary import max_positions

Check = Callable[[], object]  # false, or it raises what ends the probe
FOLDS, CHOICES = 5, 4
FIRST, FACTOR = 16, 4  # labels a class: 16, 64, 256, …
MOST_OF = 0.75  # of the labels of a class outside a fold: choices of all of them would show no variance
FREEDOM = 3  # below which Satterthwaite's estimate is noise itself
LONGEST = 512  # tokens that are read at a time at most
PENALTIES = {"logisticregression__C": (1e-4, 1e-2, 1.0)}  # inverse, on standardised features
CLASSIFIERS = {
    "logistic regression": GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), PENALTIES, cv=3
    ),
    "nearest neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier(5, metric="cosine")),
}


@torch.no_grad()  # not inference_mode, as in evaluate.py
def features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, size: int, accelerator: Accelerator
) -> np.ndarray:
    """The features of documents, [n, 4H] float32; of pairs u, v, |u − v|, u · v, [n, 16H] (Conneau et al. 2017,
    arXiv:1705.02364). The encoder runs alone, on `size` chunks of one length at a time, or as many as memory takes,
    without padding. A document longer than the model reads is cut into equal chunks, whose features are averaged."""
    info, longest = tokenizer_info(tokenizer), min(max_positions(model.config) or LONGEST, LONGEST)
    begin, end, rows, owner = len(info.prefix), len(info.suffix), [], []
    for number, ids in enumerate(encode_texts((text for texts in task.texts for text in texts), tokenizer, info)):
        inner = ids[begin : len(ids) - end]
        parts = np.array_split(inner, max(-(-len(inner) // (longest - begin - end)), 1))
        rows += [np.concatenate([info.prefix, part, info.suffix]).astype(np.int64) for part in parts]
        owner += [number] * len(parts)
    found, order = [], []
    try:
        with without_dropout(model), accelerator.autocast():
            for part in same_length(rows, size):
                ids = torch.from_numpy(np.stack([rows[i] for i in part])).to(model.device)
                output = model.base_model(input_ids=ids, output_hidden_states=True)
                layers = output[0].float(), output.hidden_states[len(output.hidden_states) // 2].float()  # [B, T, H]
                found.append(torch.cat([x for layer in layers for x in (layer.mean(1), layer[:, 0])], dim=1))
                order += [owner[i] for i in part]
    except (RuntimeError, MemoryError) as error:
        if size == 1 or not out_of_memory(error):
            raise
        found = output = layers = None
    if found is None:  # outside of `except`, whose traceback holds the activations
        return features(model, tokenizer, task, size // 2, accelerator)
    sums = np.zeros((owner[-1] + 1, found[0].shape[1]))
    np.add.at(sums, order, torch.cat(found).cpu().numpy())  # the device synchronises here
    x = (sums / np.bincount(owner)[:, None]).astype(np.float32).reshape(len(task.texts), -1, sums.shape[1])
    u, v = x[:, 0], x[:, -1]
    return u if x.shape[1] == 1 else np.concatenate([u, v, np.abs(u - v), u * v], axis=1)


def probe(labels: np.ndarray, before: np.ndarray, after: np.ndarray, seed: int = 0, check: Check = bool) -> list[dict]:
    """The curve: a row for each number of labels k a class and each classifier, with the figures of both models. Each
    split begins with `check`.

    labels: [n] int64, FEWEST or more of each class; before, after: [n, F] features of either model"""
    rows = []
    for k in sizes(labels):
        splits, share = list(choose(labels, k, seed)), share_of(labels, k)
        for name, classifier in CLASSIFIERS.items():
            row = {"k": k, "labels": len(splits[0][1][0]), "classifier": name}
            with warnings.catch_warnings(), threadpool_limits(1):  # fits too small for threads, 10 times as slow
                warnings.simplefilter("ignore", ConvergenceWarning)
                said = [
                    [
                        np.stack([check() or classifier.fit(x[c], labels[c]).predict(x[test]) for c in each])
                        for test, each in splits
                    ]
                    for x in (before, after)
                ]
            for metric, score in METRICS.items():
                scores = [[score(labels[s[0]], own) for s, own in zip(splits, model, strict=True)] for model in said]
                own = [spread(each, share)[0] for each in scores]
                value, *interval = spread([after - before for before, after in zip(*scores, strict=True)], share)
                row[metric] = {"before": own[0], "after": own[1], "difference": value, "interval": interval}
            rows.append(row)
    return rows


def sizes(labels: np.ndarray) -> list[int]:
    """The numbers of labels a class; the last one is MOST_OF those of the largest class outside a fold."""
    most = int(MOST_OF * (1 - 1 / FOLDS) * np.bincount(labels).max())
    return [k for k in (FIRST * FACTOR**i for i in range(20)) if k <= most / 2] + [most]


def share_of(labels: np.ndarray, k: int) -> float:
    """The share of its class's labels outside a fold that k labels are, in the smallest class."""
    return float(min(k / np.bincount(labels).min() / (1 - 1 / FOLDS), MOST_OF))


def choose(
    labels: np.ndarray, k: int, seed: int, choices: int = CHOICES
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Each fold's test documents, and choices of training documents: k of a class, or MOST_OF a rare one; those of a
    smaller k are among them. A pure function of its arguments."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    for fold, (outside, test) in enumerate(folds):
        orders = [np.random.default_rng([seed, fold, choice]).permutation(outside) for choice in range(choices)]
        classes = [[order[labels[order] == c] for c in range(labels.max() + 1)] for order in orders]
        yield test, [np.concatenate([own[: min(k, int(MOST_OF * len(own)))] for own in each]) for each in classes]


def f1_scores(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The scores [S, n] whose means over n are the macro-F1 of predictions [S, n] of the classes [n]."""
    true, said = (np.arange(truth.max() + 1) == values[..., None] for values in (truth, predicted))  # [(S,) n, C]
    both, either = 2.0 * (true & said), 1.0 * true + said  # F1 = Σ both / Σ either
    total = either.sum(axis=1, keepdims=True)
    f1 = both.sum(axis=1, keepdims=True) / total
    return f1.mean(axis=2) + len(truth) * ((both - f1 * either) / total).mean(axis=2)


METRICS = {"accuracy": lambda truth, said: 1.0 * (said == truth), "macro_f1": f1_scores}


def spread(scores: list[np.ndarray], share: float) -> tuple[float, float, float]:
    """The mean over documents and choices and the ends of its 95% interval, as in the module's docstring.

    scores: [CHOICES, n] float64 of each fold; share: of its class's labels that a choice takes, less than 1"""
    n, splits = sum(fold.shape[1] for fold in scores), sum(map(len, scores))
    value = sum(fold.mean(axis=0).sum() for fold in scores) / n
    documents, between, noise = 0.0, 0.0, 0.0
    for fold in scores:
        by_document, by_choice = fold.mean(axis=0), fold.mean(axis=1)  # [n], [CHOICES]
        rest = fold - by_document - by_choice[:, None] + fold.mean()
        documents += np.square(by_document - fold.mean()).sum() / n / (n - len(scores))
        between += by_choice.var(ddof=1) / len(scores)
        noise += np.square(rest).sum() / ((len(fold) - 1) * (fold.shape[1] - 1)) / fold.shape[1] / len(scores)
    weight, freedom = 1 / splits + share / (1 - share), splits - len(scores)
    variance = documents + weight * max(between - noise, 0)
    uncertain = documents**2 / (n - len(scores)) + (weight * between) ** 2 / freedom
    half = student(max(variance**2 / uncertain, FREEDOM)) * math.sqrt(variance) if variance else 0.0
    return float(value), float(value - half), float(value + half)


def conclude(task: Task, both: list[np.ndarray], trained: list[TokenStore] | None, check: Check = bool) -> dict:
    """The task as comparison.json has it, from the features of both models; trained: what the adapted one has read."""
    seen = task.rows[task.seen(*trained)] if trained else None  # a query and a document may be of one row
    found = {"text": task.name, "documents": len(task.texts), "rows": task.of[0], "rows_taken": task.of[1]}
    found |= {"in_training_text": trained and len(seen), "rows_in_training_text": trained and np.unique(seen).tolist()}
    if task.pairs is not None:
        return found | search(task.pairs, *both)
    found |= {"classes": int(task.labels.max()) + 1, "splits": FOLDS * CHOICES}
    return found | {"curve": probe(task.labels, *both, check=check)}


def figures(task: dict[str, Any]) -> dict[str, Any]:
    """For all_results.json: a search's task_mrr_10, …; logistic regression of fewest (task_few_…) and most labels."""
    names = "documents", "queries", "rows", "rows_taken", "in_training_text"
    found = {f"task_{name}": task[name] for name in names if name in task}
    found["task_first_rows_in_training_text"] = (task["rows_in_training_text"] or [])[:5]  # all: comparison.json
    named = {f"task_{name}": own for name, own in task.get("metrics", {}).items()}
    rows = [row for row in task.get("curve", ()) if row["classifier"] == "logistic regression"]
    for prefix, row in zip(("task_few_", "task_"), rows[:1] + rows[-1:], strict=bool(rows)):
        found[f"{prefix}labels_a_class"] = row["k"]
        named |= {f"{prefix}{metric}": row[metric] for metric in METRICS}
    for name, own in named.items():
        found |= {f"{name}_before": own["before"], name: own["after"], f"{name}_difference": own["difference"]}
        found |= {f"{name}_low": own["interval"][0], f"{name}_high": own["interval"][1]}
    return found
