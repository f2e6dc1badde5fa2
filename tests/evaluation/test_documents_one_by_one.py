"""Layout is not domain: a gain in chunks, and beside it the gain on documents one by one."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM

from mlm.data.masking import corrupt, draw, select_tokens
from mlm.evaluation.compare import compare, in_words
from mlm.evaluation.eval_set import open_eval_sets
from mlm.evaluation.evaluate import GRID, evaluate, evaluate_all
from mlm.model.load import open_corpus
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.summary import outcome
from mlm.train import train
from tests.model.small_models import one_length_model, tokenizer_of


def eval_set_of(toy, tmp_path, length=16, **settings):
    """The held-out eval set of documents of 10 tokens and, the last two, of 34 and 91."""
    file = tmp_path / "long.txt"
    sentence = "the old cat likes milk every day . "
    file.write_text(toy.validation_file.read_text() + sentence * 4 + "\n" + sentence * 11 + "and no more\n")
    config = toy.config(max_seq_length=length, validation_file=str(file), **settings)
    tokenizer, info, stores = open_corpus(config)
    return tokenizer, open_eval_sets(config, tokenizer, info, stores["validation"], length)["held_out"]


def test_documents_stand_alone_from_their_start_with_their_special_tokens(toy, tmp_path):
    tokenizer, eval_set = eval_set_of(toy, tmp_path)
    whole = eval_set.one_by_one
    assert sorted(whole.chunk_ids) == list(range(62))
    rows = whole.chunks.take(np.arange(62))
    offsets = eval_set.store.document_offsets
    for document in range(62):
        ids = eval_set.store.ids[offsets[document] : offsets[document + 1]].tolist()
        found = rows.ids[document][: rows.lengths[document]].tolist()
        assert found == (ids if len(ids) <= 64 else [*ids[:63], tokenizer.sep_token_id])
        assert found[0] == tokenizer.cls_token_id
    assert rows.lengths.max() == 64, "the model's position table takes 64"


def test_their_perplexity_is_that_of_a_slow_evaluation(toy, tmp_path):
    """One document at a time, without padding, through the stock dense model."""
    _, eval_set = eval_set_of(toy, tmp_path)
    model, whole = AutoModelForMaskedLM.from_pretrained(toy.checkpoint), eval_set.one_by_one
    nats, count = 0.0, 0
    for document in whole.chunk_ids:
        rows = whole.chunks.take(np.array([document]))
        draws = draw(0, 0, np.array([document]), rows.ids.shape[1])
        seen = corrupt(rows.ids, select_tokens(whole.info.maskable[rows.ids], draws, 0.15), draws, whole.recipe)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(seen.ids)).logits[0]
        nats += F.cross_entropy(
            logits[seen.positions].double(), torch.from_numpy(seen.targets), reduction="sum"
        ).item()
        count += len(seen.targets)
    found = evaluate_all(SparseMaskedLM(model), {"held_out": eval_set}, Accelerator(cpu=True))["documents"]
    assert found.masked == count
    assert found.loss == pytest.approx(nats / count, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "documents", "longest"),
    [
        ({}, 62, 64),
        ({"max_eval_samples": 7}, 7, 64),
        ({"eval_mask_folds": 3, "eval_mask_seeds": 2}, 62, 64),
        ({"pad_to_max_length": True}, 62, 16),
    ],
)
def test_they_cost_little(toy, tmp_path, settings, documents, longest):
    """No more documents than chunks are asked for, one mask round, batches of as many tokens."""
    _, eval_set = eval_set_of(toy, tmp_path, per_device_eval_batch_size=8, **settings)
    whole = eval_set.one_by_one
    assert (len(whole.chunk_ids), whole.chunks.chunk_size) == (documents, longest)
    assert len(whole.config.rounds) == 1
    assert whole.config.per_device_eval_batch_size * longest == 8 * 16
    found = evaluate(
        SparseMaskedLM(AutoModelForMaskedLM.from_pretrained(toy.checkpoint)), whole, Accelerator(cpu=True)
    )
    assert found.masked > 0


def test_a_row_a_document_and_a_handful_of_documents_are_not_measured_again(toy, tmp_path):
    assert eval_set_of(toy, tmp_path, line_by_line=True)[1].one_by_one is None
    few = tmp_path / "few.txt"
    few.write_text("the old cat likes milk every day .\n" * 4)
    config = toy.config(validation_file=str(few))
    tokenizer, info, stores = open_corpus(config)
    assert open_eval_sets(config, tokenizer, info, stores["validation"], 16)["held_out"].one_by_one is None


def told(world_before, after_in_chunks, after_alone, toy, tmp_path):
    tokenizer, eval_set = eval_set_of(toy, tmp_path)
    before = evaluate_all(
        SparseMaskedLM(AutoModelForMaskedLM.from_pretrained(toy.checkpoint)),
        {"held_out": eval_set},
        Accelerator(cpu=True),
    )
    return tokenizer, eval_set, before


@pytest.mark.parametrize(
    ("in_chunks", "alone", "story"),
    [
        (1.0, 0.1, "a part of the gain in chunks is of how they are cut and joined, not of the domain"),
        (0.1, 1.0, "chunks hide a part of the gain"),
        (0.5, 0.5, None),
    ],
)
def test_two_stories_are_told_apart(toy, tmp_path, in_chunks, alone, story):
    """A model that gains so many nats a token in chunks, and so many on documents one by one."""
    tokenizer, eval_set = eval_set_of(toy, tmp_path)
    model = SparseMaskedLM(AutoModelForMaskedLM.from_pretrained(toy.checkpoint))
    before = evaluate_all(model, {"held_out": eval_set}, Accelerator(cpu=True))
    rng = np.random.default_rng(0)

    def better(evaluation, nats):
        moved = evaluation.nats - nats + rng.normal(0, 0.1, evaluation.masked)
        return evaluation._replace(nats=np.round(moved * GRID) / GRID)

    after = {"held_out": better(before["held_out"], in_chunks), "documents": better(before["documents"], alone)}
    found = compare(
        *(eval_set, before["held_out"], after["held_out"], tokenizer, None), (before["documents"], after["documents"])
    )
    whole = found["one_by_one"]
    assert whole["gain"]["value"] == pytest.approx(math.exp(alone), rel=0.05)
    assert found["gain"]["value"] == pytest.approx(math.exp(in_chunks), rel=0.05)
    assert whole["differs"] == (story is not None)
    line = in_words(found).splitlines()[-1]
    assert line.startswith("one by one: perplexity ")
    masked = len(np.unique(before["documents"].chunk))
    assert masked < 62, "some of the short ones have no masked token, and no part in the interval"
    assert f"from {masked} documents of at most 64 tokens" in line
    assert line.endswith(f": another story, {story}" if story else "tokens)")
    whole["gain"]["interval"] = [None, None]
    assert "no interval: a loss is infinite" in in_words(found).splitlines()[-1]


def test_a_run_reports_the_gain_one_by_one_beside_the_other(toy, tmp_path, capsys):
    results = train(toy.config(tmp_path / "run", max_train_steps=60)).results
    written = json.loads((tmp_path / "run" / "comparison.json").read_text())["held_out"]["one_by_one"]
    assert written["gain"]["value"] == results["documents_gain"] > 1
    assert written["gain"]["interval"] == [results["documents_gain_low"], results["documents_gain_high"]]
    before, after = results["documents_perplexity_before"], results["documents_perplexity"]
    assert (written["perplexity_before"], written["perplexity"]) == (before, after)
    assert results["documents_gain"] == pytest.approx(before / after)
    assert any(line.startswith("one by one: ") for line in capsys.readouterr().out.splitlines())
    [row] = [line for line in outcome({**results, "output_dir": "run"}).splitlines() if line.startswith("one by one")]
    assert f"{results['documents_gain']:.4g}× (95% interval {results['documents_gain_low']:.4g} to " in row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["nystromformer", "reformer"])
def test_models_of_one_length_are_measured_in_chunks_alone(model_type, tmp_path, toy):
    one_length_model(model_type).save_pretrained(tmp_path / "model")
    tokenizer_of().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    text.write_text("".join(" ".join(f"w{i}" for i in rng.integers(0, 90, n)) + "\n" for n in rng.integers(3, 40, 60)))
    files = {"train_file": str(text), "validation_file": str(text), "model_name_or_path": str(tmp_path / "model")}
    results = train(toy.config(tmp_path / "run", dropout=None, max_train_steps=2, **files)).results
    assert results["gain"] > 0
    assert "documents_gain" not in results
