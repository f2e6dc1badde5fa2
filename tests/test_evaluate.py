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
from mlm.evaluate import EvaluateConfig, Evaluation, evaluate, make_text
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
    recipe = make_recipe(MaskingConfig(), facts)
    text = make_text("toy", store, ChunkConfig(remainder="pad"), 16, recipe, facts, EvaluateConfig())
    return AutoModelForMaskedLM.from_pretrained(toy.checkpoint), text


def measure(held_out, chunk_ids=None, complete=True, recipe=None, **config) -> Evaluation:
    model, text = held_out
    text = dataclasses.replace(
        text,
        chunk_ids=text.chunk_ids if chunk_ids is None else chunk_ids,
        recipe=recipe or text.recipe,
        config=EvaluateConfig(**config),
    )
    return evaluate(SparseMaskedLM(model), text, Accelerator(cpu=True), complete)


def slow_evaluation(held_out, mask_seed):
    """One chunk at a time through the stock dense model; a sum over single tokens, in Python."""
    model, text = held_out
    chunks, recipe, facts = text.chunks, text.recipe, text.facts
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
    assert (found.masked, found.hit.sum()) == (count, hits)
    assert found.loss == pytest.approx(nats / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.accuracy == hits / count


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_perplexity_does_not_depend_on_the_batch_size(held_out, batch_size):
    reference = measure(held_out, per_device_eval_batch_size=4)
    other = measure(held_out, per_device_eval_batch_size=batch_size)
    assert other.perplexity == pytest.approx(reference.perplexity, rel=1e-6)
    assert other.same_masks(reference)
    np.testing.assert_allclose(other.nats, reference.nats, rtol=1e-5)


def test_each_chunk_is_counted_once_wherever_it_stands(held_out):
    every = measure(held_out)
    some = measure(held_out, chunk_ids=np.array([9, 2, 5]))
    expected = np.concatenate([every.nats[every.chunk == chunk] for chunk in (9, 2, 5)])
    np.testing.assert_allclose(some.nats, expected, rtol=1e-5)


def test_the_mask_seed_names_the_masks(held_out):
    one, again, other = (measure(held_out, eval_mask_seed=seed) for seed in (1, 1, 2))
    assert one.nats.tolist() == again.nats.tolist()
    assert not one.same_masks(other)


def test_evaluation_leaves_the_training_mode_and_the_generator_alone(held_out):
    model, text = held_out
    sparse = SparseMaskedLM(model).train()
    before = torch.get_rng_state()
    evaluate(sparse, dataclasses.replace(text, chunk_ids=np.arange(3)), Accelerator(cpu=True))
    assert sparse.training
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_masked_is_no_figure(held_out):
    """Not a perplexity of 1, which would be a perfect model's."""
    found = measure(held_out, recipe=dataclasses.replace(held_out[1].recipe, select=0))
    assert found.masked == 0
    assert all(math.isnan(value) for value in (found.loss, found.perplexity, found.accuracy))
