"""Exact evaluation (law 3): no figure depends on how the pass was cut."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM

from mlm.chunks import ChunkConfig, cut_into_chunks
from mlm.evaluate import EvaluateConfig, Evaluation, evaluate
from mlm.masking import MaskingConfig, corrupt, draw, make_recipe
from mlm.model import SparseMaskedLM
from mlm.stream import prepare
from mlm.tokenizer import load_tokenizer, token_facts


@pytest.fixture(scope="module")
def held_out(toy):
    config = toy.config()
    tokenizer = load_tokenizer(str(toy.checkpoint))
    facts = token_facts(tokenizer)
    store = prepare(config.corpus, tokenizer, facts, config.stream)["validation"]
    chunks = cut_into_chunks(store, ChunkConfig(remainder="pad"), 16, facts)
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    return model, chunks, make_recipe(MaskingConfig(), facts), facts


def measure(held_out, chunk_ids=None, **config) -> Evaluation:
    model, chunks, recipe, facts = held_out
    chunk_ids = np.arange(len(chunks)) if chunk_ids is None else chunk_ids
    return evaluate(
        SparseMaskedLM(model),
        chunks,
        chunk_ids,
        recipe,
        facts,
        EvaluateConfig(**config),
        Accelerator(cpu=True),
    )


def slow_evaluation(held_out, mask_seed):
    """One chunk at a time through the stock dense model; a sum over single tokens, in Python."""
    model, chunks, recipe, facts = held_out
    nats, count, hits = 0.0, 0, 0
    for chunk in range(len(chunks)):
        rows = chunks.take(np.array([chunk]))
        draws = draw(mask_seed, 0, np.array([chunk]), rows.ids.shape[1])
        seen = corrupt(rows.ids, facts.ordinary[rows.ids], draws, recipe, rows.word_starts)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(seen.ids)).logits[0]
        for position, target in zip(seen.positions, seen.targets, strict=True):
            nats += -F.log_softmax(logits[position].double(), -1)[target].item()
            hits += int(logits[position].argmax() == target)
            count += 1
    return nats, count, hits


def test_evaluation_equals_the_slow_one(held_out):
    found = measure(held_out, eval_mask_seed=5)
    nats, count, hits = slow_evaluation(held_out, 5)
    assert (found.counts.sum(), found.hits.sum()) == (count, hits)
    assert found.loss == pytest.approx(nats / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.accuracy == hits / count


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_perplexity_does_not_depend_on_the_batch_size(held_out, batch_size):
    reference = measure(held_out, per_device_eval_batch_size=4)
    other = measure(held_out, per_device_eval_batch_size=batch_size)
    assert other.perplexity == pytest.approx(reference.perplexity, rel=1e-6)
    assert (other.counts == reference.counts).all()
    np.testing.assert_allclose(other.nats, reference.nats, rtol=1e-5)


def test_each_chunk_is_counted_once_wherever_it_stands(held_out):
    every = measure(held_out)
    some = measure(held_out, chunk_ids=np.array([9, 2, 5]))
    np.testing.assert_allclose(some.nats, every.nats[[9, 2, 5]], rtol=1e-5)


def test_the_mask_seed_names_the_masks(held_out):
    assert (
        measure(held_out, eval_mask_seed=1).nats.tolist() == measure(held_out, eval_mask_seed=1).nats.tolist()
    )
    assert (
        measure(held_out, eval_mask_seed=1).counts.tolist()
        != measure(held_out, eval_mask_seed=2).counts.tolist()
    )


def test_evaluation_leaves_the_training_mode_and_the_generator_alone(held_out):
    model, chunks, recipe, facts = held_out
    sparse = SparseMaskedLM(model).train()
    before = torch.get_rng_state()
    evaluate(sparse, chunks, np.arange(3), recipe, facts, EvaluateConfig(), Accelerator(cpu=True))
    assert sparse.training
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_masked_is_no_figure(held_out):
    """Not a perplexity of 1, which would be a perfect model's."""
    model, chunks, recipe, facts = held_out
    found = measure((model, chunks, dataclasses.replace(recipe, select=0), facts))
    assert found.counts.sum() == 0
    assert all(math.isnan(value) for value in (found.loss, found.perplexity, found.accuracy))
