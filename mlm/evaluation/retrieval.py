"""Whether search profits: where the documents of each query come among all documents of the task.

    nearness    the cosine of the means over the tokens of the last layer, of the query and of a document
    rank        the documents at least as near as this one, itself included, so that ties count against a model
    mrr_10      1 / rank of the query's first document, 0 beyond rank 10
    recall_k    the share of the query's documents whose rank is at most k

Figures are means over queries, and so are the intervals of their differences (interval.py)."""

from typing import Any

import numpy as np

from mlm.evaluation.interval import interval

DEPTH, RECALL = 10, (1, 10, 100)  # the depth is that of MS MARCO (Bajaj et al. 2016, arXiv:1611.09268)
ROUNDING = 1e-6  # of cosines in float32: equal documents need not have equal ones, to the bit


def search(pairs: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The figures of both models and their differences. pairs: as in Task; before, after: [Q + D, 4H] features"""
    metrics, was, now = {}, score(pairs, before), score(pairs, after)
    for name, own in was.items():
        difference = now[name] - own
        means = (float(each.mean()) for each in (own, now[name], difference))
        metrics[name] = dict(zip(("before", "after", "difference"), means, strict=True))
        metrics[name]["interval"] = [*interval(difference, np.ones(len(own), np.int64))]
    return {"queries": len(own), "documents": len(before) - len(own), "metrics": metrics}


def score(pairs: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure of each query: [Q] float64."""
    mean = features[:, : features.shape[1] // 4]  # over tokens, of the last layer: [Q + D, H]
    mean = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    query, own = pairs[:, 0], np.bincount(pairs[:, 0])
    near = mean[: len(own)] @ mean[len(own) :].T  # [Q, D]
    ranks = np.array([(~(near[q] < near[q, d - len(own)] - ROUNDING)).sum() for q, d in pairs])  # of NaN the last
    first = np.full(len(own), near.shape[1])
    np.minimum.at(first, query, ranks)
    recall = {f"recall_{k}": np.bincount(query, ranks <= k) / own for k in RECALL if k < near.shape[1]}
    return {f"mrr_{DEPTH}": np.where(first <= DEPTH, 1 / first, 0.0), **recall}
