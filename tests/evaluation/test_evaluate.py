"""Exact evaluation (invariant 3): no figure depends on how the chunks are cut into batches and processes."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from mlm.data.chunks import ChunkConfig
from mlm.data.masking import corrupt, draw, select_fold, select_tokens
from mlm.data.token_store import prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvaluateConfig, make_eval_set
from mlm.evaluation.evaluate import Evaluation, evaluate
from mlm.evaluation.evaluate import measure as of_text
from mlm.model.predict import cross_entropy
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import train
from tests.data.stores import build
from tests.runs import TWO, run
from tests.tokenizers_for_tests import wordpiece


@pytest.fixture(scope="module")
def held_out(toy):
    config = toy.config()
    tokenizer = load_tokenizer(str(toy.checkpoint))
    info = tokenizer_info(tokenizer)
    store = prepare(config.corpus, tokenizer, info, config.token_store)["validation"]
    eval_set = make_eval_set("toy", store, ChunkConfig(remainder="pad"), 16, info, EvaluateConfig())
    return AutoModelForMaskedLM.from_pretrained(toy.checkpoint), eval_set


def measure(held_out, chunk_ids=None, complete=True, **config) -> Evaluation:
    model, eval_set = held_out
    eval_set = dataclasses.replace(
        eval_set, chunk_ids=eval_set.chunk_ids if chunk_ids is None else chunk_ids, config=EvaluateConfig(**config)
    )
    return evaluate(SparseMaskedLM(model), eval_set, Accelerator(cpu=True), complete)


def slow_evaluation(held_out, mask_seed):
    """One chunk at a time through the stock dense model; a sum over single tokens, in Python."""
    model, eval_set = held_out
    chunks, recipe, info = eval_set.chunks, eval_set.recipe, eval_set.info
    nats, count, hits = 0.0, 0, 0
    for chunk in range(len(chunks)):
        rows = chunks.take(np.array([chunk]))
        draws = draw(mask_seed, 0, np.array([chunk]), rows.ids.shape[1])
        seen = corrupt(rows.ids, select_tokens(info.maskable[rows.ids], draws, 0.15), draws, recipe)
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
    assert found.summary()["accuracy"] == hits / count


@pytest.mark.parametrize("vocabulary", [8192, 30522, 250002])
def test_nats_of_a_large_vocabulary_are_off_by_nothing_on_average(vocabulary):
    """Against float64. `F.cross_entropy` in float32 is 1e-7, 5e-7 and 1e-5 nats too low on these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(120, vocabulary, generator=generator) * 3
    targets = torch.randint(vocabulary, (120,), generator=generator)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    errors = cross_entropy(logits, targets) - exact
    assert abs(errors.mean()) < 8e-8
    assert errors.abs().max() < 4e-6


def test_a_chunk_s_number_does_not_wrap(held_out):
    """2^31 chunks are as many as a text of 34 billion tokens has at 16; the one read here is all of a word's token."""
    model, eval_set = held_out
    last = 2**31 + 5
    word = np.flatnonzero(eval_set.info.maskable)[-1].astype(np.uint16)
    ids = np.broadcast_to(word, (last + 1) * 16)  # takes no memory
    chunks = dataclasses.replace(
        eval_set.chunks, ids=ids, word_starts=np.broadcast_to(True, ids.shape), num_chunks=last + 1
    )
    found = measure((model, dataclasses.replace(eval_set, chunks=chunks)), np.array([3, last]))
    assert np.unique(found.chunk).tolist() == [3, last]
    assert chunks.places(found.chunk, found.column).max() // 16 == last


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
    found = measure(held_out, eval_mlm_probability=0)
    assert found.masked == 0
    assert all(math.isnan(value) for value in (found.loss, found.perplexity, found.summary()["accuracy"]))


@given(
    seed=st.integers(0, 2**40), folds=st.integers(2, 9), whole_word=st.booleans(), data=st.data(),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 30)),
)  # fmt: skip
def test_folds_predict_each_token_once_and_keep_words_together(seed, folds, whole_word, data, shape):
    rows, length = shape
    flags = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    maskable, starts = (np.array(data.draw(flags)).reshape(shape) for _ in range(2))
    draws = draw(seed, 0, np.arange(rows), length)
    chosen = np.stack([select_fold(maskable, draws, starts if whole_word else None, k, folds) for k in range(folds)])
    assert (chosen.sum(axis=0) == maskable).all(), "each maskable token in one fold, no other in any"

    for row in range(rows):
        begins = [t for t in range(length) if t == 0 or starts[row, t] or not whole_word]
        units = [range(a, b) for a, b in zip(begins, [*begins[1:], length], strict=True)]
        fold_of = [{int(chosen[:, row, t].argmax()) for t in unit if maskable[row, t]} for unit in units]
        assert all(len(found) <= 1 for found in fold_of), "a word stays together"
        sizes = np.bincount([f for found in fold_of for f in found], minlength=folds)
        assert sizes.max() - sizes.min() <= 1, "folds are as even as they can be"


def test_a_fold_depends_on_seed_chunk_and_place_alone():
    """Not on the chunks beside it, nor on the padding of its row."""
    maskable = np.ones((4, 12), bool)
    together = select_fold(maskable, draw(3, 0, np.arange(4), 12), None, 1, 3)
    for chunk in range(4):
        padded = np.pad(maskable[:1], [(0, 0), (0, 5)])
        alone = select_fold(padded, draw(3, 0, np.array([chunk]), 17), None, 1, 3)
        assert (alone[0, :12] == together[chunk]).all()
    other = select_fold(maskable, draw(4, 0, np.arange(4), 12), None, 1, 3)
    assert (other != together).any()


@pytest.mark.parametrize("whole_word", [False, True])
def test_an_evaluation_in_folds_predicts_every_token_of_the_text_once(held_out, whole_word):
    eval_set = held_out[1]
    found = measure(held_out, eval_whole_word_mask=whole_word, eval_mask_folds=5)
    rows = eval_set.chunks.take(np.asarray(eval_set.chunk_ids))
    row, column = np.nonzero(eval_set.info.maskable[rows.ids])
    order = np.lexsort((found.column, found.chunk))
    assert (found.chunk[order].tolist(), found.column[order].tolist()) == (row.tolist(), column.tolist())
    assert (found.target == rows.ids[found.chunk, found.column]).all()
    shares = np.bincount(found.mask_round, minlength=5) / found.masked
    assert (abs(shares - 1 / 5) < 0.03).all(), "a fifth of the tokens in each mask round"


def test_folds_are_corrupted_as_the_recipe_says(held_out):
    config = EvaluateConfig(eval_mask_folds=7, eval_mask_seeds=4)
    eval_set = dataclasses.replace(held_out[1], config=config)
    seen = {"mask": 0, "kept": 0, "all": 0}
    for mask_round in range(len(config.rounds)):
        batch = eval_set.batch(eval_set.chunk_ids, mask_round)
        shown = batch.input_ids.reshape(-1)[batch.positions]
        seen["mask"] += int((shown == eval_set.info.mask_id).sum())
        seen["kept"] += int((shown == batch.targets).sum())
        seen["all"] += len(shown)
    assert seen["mask"] / seen["all"] == pytest.approx(0.8, abs=0.03)
    assert seen["kept"] / seen["all"] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("config", [{"eval_mask_seeds": 2}, {"eval_mask_folds": 3, "eval_mask_seeds": 2}])
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_neither_masks_nor_nats_depend_on_the_batch_size(held_out, config, batch_size):
    reference = measure(held_out, per_device_eval_batch_size=4, **config)
    other = measure(held_out, per_device_eval_batch_size=batch_size, **config)
    assert other.same_masks(reference)
    np.testing.assert_allclose(other.nats, reference.nats, rtol=1e-4, atol=1e-5)
    assert other.perplexity == pytest.approx(reference.perplexity, rel=1e-6)


def test_sums_are_the_same_to_the_bit_in_any_order(held_out):
    """Also of a model that is sure of a token: float32 has nats near 0 that no sum of large ones keeps."""
    sure = copy.deepcopy(held_out[0])
    sure.cls.predictions.bias.data[np.bincount(measure(held_out).target).argmax()] += 20
    found = measure((sure, held_out[1]), eval_mask_folds=3)
    assert 0 < (found.nats < 1e-2).sum() < found.masked
    assert (found.nats * 2**24 % 1 == 0).all()
    total = found.nats.sum()
    assert total == found.nats[::-1].sum() == math.fsum(found.nats)
    by_chunk = np.bincount(found.chunk, found.nats)
    assert by_chunk.sum() == by_chunk[::-1].sum() == total


def test_seeds_are_measured_one_by_one_and_together(held_out):
    both = measure(held_out, eval_mask_seed=3, eval_mask_seeds=2, eval_mask_folds=2)
    config = EvaluateConfig(eval_mask_seed=3, eval_mask_seeds=2, eval_mask_folds=2)
    parts = both.seeds(config)
    assert [part.masked for part in parts] == [both.masked // 2] * 2
    for seed, part in zip((3, 4), parts, strict=True):
        alone = measure(held_out, eval_mask_seed=seed, eval_mask_folds=2)
        assert part.nats.tolist() == alone.nats.tolist()


def test_a_short_evaluation_is_the_first_mask_round_of_a_complete_one(held_out):
    """So that the curve of a run is of one and the same set of masked tokens."""
    config = {"eval_mask_seeds": 2, "eval_mask_folds": 3}
    short, whole = (measure(held_out, complete=complete, **config) for complete in (False, True))
    first = whole.first_round
    assert short.same_masks(first)
    assert short.nats.tolist() == first.nats.tolist()
    assert 0 < first.masked < whole.masked / 4


def test_bits_per_character_are_counted_over_the_text_itself(toy, held_out):
    found = measure(held_out)
    figures = of_text(found, held_out[1])
    lines = toy.validation_file.read_text().splitlines()
    tokenizer = load_tokenizer(str(toy.checkpoint))
    tokens = sum(len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines)
    bits = found.loss / math.log(2) * tokens
    assert figures["bits_per_character"] == pytest.approx(bits / sum(map(len, lines)))
    assert figures["bits_per_word"] == pytest.approx(bits / sum(len(line.split()) for line in lines))


def test_a_script_without_spaces_has_no_bits_per_word(held_out):
    text = held_out[1]
    header = {**text.store.header, "characters": 1000, "spaced_words": 40}
    unspaced = dataclasses.replace(text, store=dataclasses.replace(text.store, header=header))
    figures = of_text(measure(held_out), unspaced)
    assert figures["bits_per_word"] is None
    assert figures["bits_per_character"] > 0


def test_unknown_tokens_cost_what_the_characters_behind_them_would(held_out):
    """17.24 bits each, the logarithm of how many characters Unicode has, up to 1% of the tokens; then no figure."""
    text, found = held_out[1], measure(held_out)

    def bits(unknown):
        counts = {"maskable_tokens": 1000 - unknown, "unknown_tokens": unknown, "characters": 4000}
        store = dataclasses.replace(text.store, header={**text.store.header, **counts})
        return of_text(found, dataclasses.replace(text, store=store))["bits_per_character"]

    known = found.loss / math.log(2) / 4000
    assert bits(0) == pytest.approx(known * 1000)
    assert bits(10) == pytest.approx(known * 990 + 10 * 4 * math.log2(154_998) / 4000)
    assert bits(10) > bits(0), "a token that is given up is not free"
    assert math.isnan(bits(11)) and math.isnan(bits(990))


def test_a_tokenizer_that_knows_nothing_does_not_win(tmp_path):
    """Chinese to a tokenizer of English, with a few words that it knows: it had 15 times fewer bits a character."""
    tokenizer = wordpiece(["the old fox likes the young owl"] * 9, 120)
    info = tokenizer_info(tokenizer)
    texts = ["the 房间很大 old 早餐 fox 服务员态度很好 " * 9] * 9
    store = build(texts, tokenizer, info, tmp_path, {"split": "validation"})
    eval_set = make_eval_set("text", store, ChunkConfig(), 16, info, EvaluateConfig())
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=info.size, **size))
    found = of_text(evaluate(SparseMaskedLM(model), eval_set, Accelerator(cpu=True)), eval_set)
    assert math.isfinite(found["perplexity"])
    assert math.isnan(found["bits_per_character"]) and math.isnan(found["bits_per_word"])


def test_more_folds_than_a_chunk_has_tokens_are_refused(toy, tmp_path):
    modules = {"evaluate": EvaluateConfig(eval_mask_folds=17)}
    with pytest.raises(UserError, match="--eval_mask_folds 17: a chunk has 16 tokens only"):
        train(toy.config(tmp_path / "run", modules=modules))


def short_of_memory(sparse, most):
    """The model, on a device that takes `most` chunks at a time."""

    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError(f"no memory for {len(kwargs['input_ids'])} chunks")

    sparse.model.register_forward_pre_hook(check, with_kwargs=True)
    return sparse


@pytest.mark.parametrize("most", [1, 3, 8])
def test_an_evaluation_that_runs_out_of_memory_goes_on_in_smaller_batches(held_out, most, caplog):
    """To the bit as if the batches had been so small from the start, and no chunk is lost or seen twice."""
    model, eval_set = held_out
    eval_set = dataclasses.replace(eval_set, config=EvaluateConfig(per_device_eval_batch_size=12, eval_mask_seeds=2))
    sparse = short_of_memory(SparseMaskedLM(copy.deepcopy(model)), most).train()
    with caplog.at_level("INFO", "mlm"):
        found = evaluate(sparse, eval_set, Accelerator(cpu=True))
    size = {1: 1, 3: 3, 8: 6}[most]
    assert caplog.messages[-1] == f"out of memory in evaluation: from here on {size} chunks at a time"
    assert sparse.training
    small = measure(held_out, per_device_eval_batch_size=size, eval_mask_seeds=2)
    assert [column.tobytes() for column in found] == [column.tobytes() for column in small]
    whole = measure(held_out, per_device_eval_batch_size=12, eval_mask_seeds=2)
    assert found.same_masks(whole)
    assert found.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_one_chunk_that_does_not_fit_into_memory_is_one_line_that_names_the_flags(held_out):
    model, eval_set = held_out
    sparse = short_of_memory(SparseMaskedLM(copy.deepcopy(model)), 0).train()
    with pytest.raises(UserError, match=r"16 tokens \(--per_device_eval_batch_size 1\): .*--max_seq_length"):
        evaluate(sparse, eval_set, Accelerator(cpu=True))
    assert sparse.training


def test_other_failures_of_an_evaluation_are_not_taken_for_a_lack_of_memory(held_out):
    model, eval_set = held_out
    sparse = SparseMaskedLM(copy.deepcopy(model))

    def fail(*_):
        raise RuntimeError("a defect")

    sparse.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a defect"):
        evaluate(sparse, eval_set, Accelerator(cpu=True))


# Masks of their own


def test_evaluation_masks_do_not_follow_the_masks_of_training(toy, tmp_path):
    plain = train(toy.config(tmp_path / "plain", max_train_steps=1)).results
    masks = {"mlm_probability": 0.3, "whole_word_mask": True, "mask_replace_prob": 0.5, "random_replace_prob": 0.5}
    other = train(toy.config(tmp_path / "other", max_train_steps=1, **masks)).results
    same = ("perplexity_before", "eval_loss_before", "accuracy_before", "eval_masked_tokens", "perplexity_unigram")
    assert {name: other[name] for name in same} == {name: plain[name] for name in same}
    assert other["train_loss"] != plain["train_loss"]


def test_a_share_of_the_tokens_is_measured_as_asked_for(held_out):
    eval_set = held_out[1]
    plain, more = measure(held_out), measure(held_out, eval_mlm_probability=0.5)
    maskable = eval_set.info.maskable[eval_set.chunks.take(np.asarray(eval_set.chunk_ids)).ids].sum()
    assert plain.masked / maskable == pytest.approx(0.15, abs=0.05)
    assert more.masked / maskable == pytest.approx(0.5, abs=0.07)
    assert set(zip(plain.chunk, plain.column, strict=True)) < set(zip(more.chunk, more.column, strict=True))


def test_whole_words_are_measured_where_asked_for_and_else_tokens(tmp_path):
    """A vocabulary that has long words in pieces."""
    tokenizer = wordpiece(["the old fox likes the young owl"] * 9, 120)
    info = tokenizer_info(tokenizer)
    store = build(["the fox whenever undrinkable grapes "] * 60, tokenizer, info, tmp_path, {"split": "validation"})
    cut = {}
    for whole_words in (False, True):
        config = EvaluateConfig(eval_whole_word_mask=whole_words)
        eval_set = make_eval_set("text", store, ChunkConfig(), 16, info, config)
        rows = eval_set.chunks.take(np.asarray(eval_set.chunk_ids))
        chosen = np.zeros(rows.ids.shape, bool)
        chosen.reshape(-1)[eval_set.batch(eval_set.chunk_ids, 0).positions] = True
        inside = ~rows.word_starts[:, 1:] & info.maskable[rows.ids][:, 1:]
        cut[whole_words] = (chosen[:, 1:] != chosen[:, :-1])[inside].mean()
    assert cut[True] == 0
    assert cut[False] > 0.1


def test_what_figures_depend_on_is_in_the_identity_and_the_batch_size_is_not():
    changed = {
        "max_eval_samples": 3,
        "eval_mlm_probability": 0.2,
        "eval_whole_word_mask": True,
        "eval_mask_seed": 1,
        "eval_mask_seeds": 2,
        "eval_mask_folds": 2,
    }
    usual = EvaluateConfig().identity
    assert usual.keys() == changed.keys()
    for name, value in changed.items():
        assert EvaluateConfig(**{name: value}).identity == {**usual, name: value}
    assert EvaluateConfig(per_device_eval_batch_size=1).identity == usual


def test_a_run_is_not_resumed_under_other_evaluation_masks(toy, tmp_path):
    config = toy.config(tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    train(config)
    resumed = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoints" / "step_1")}
    for setting in ({"eval_mlm_probability": 0.3}, {"eval_whole_word_mask": True}):
        with pytest.raises(UserError, match=f"another experiment, with {next(iter(setting))} "):
            train(toy.config(tmp_path / "run", max_train_steps=2, checkpointing_steps=1, **resumed, **setting))


# Several processes


PROGRAM = """
import sys
from dataclasses import replace
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from mlm import cli
from mlm.config import Config
from mlm.errors import UserError
from mlm.evaluation.eval_set import open_eval_sets
from mlm.evaluation.evaluate import evaluate
from mlm.model.load import load_model, open_corpus
from mlm.model.sparse_head import SparseMaskedLM
from tests.evaluation.test_evaluate import short_of_memory

folder, most, *flags = sys.argv[1:]
config = cli.parse_config(Config, flags)
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
tokenizer, info, stores = open_corpus(config)
eval_set = open_eval_sets(config, tokenizer, info, stores["validation"], 16)["held_out"]
eval_set = replace(eval_set, chunk_ids=eval_set.chunk_ids[:11])
model = SparseMaskedLM(load_model(config.model, tokenizer, 0))
try:
    if rank == 1:
        short_of_memory(model, int(most))
    np.savez(f"{folder}/{rank}.npz", *evaluate(model, eval_set, accelerator))
except UserError as error:
    print(f"process {rank}: {error}")
finally:
    dist.destroy_process_group()
"""


def on_two_processes(toy, tmp_path, most):
    (tmp_path / "program.py").write_text(PROGRAM)
    flags = [*toy.flags(tmp_path), "--eval_mask_folds=3"]
    status, output, errors = run(TWO, [str(tmp_path), str(most), *flags], str(tmp_path / "program.py"))
    assert status == 0, errors
    return output


@pytest.mark.slow
@pytest.mark.parametrize("most", [1000, 2], ids=["enough memory", "one of them short of memory"])
def test_two_processes_measure_what_one_does(toy, held_out, tmp_path, most):
    """Prediction by prediction, in its order: three mask rounds, chunks that do not halve. It is the main process that
    has them."""
    on_two_processes(toy, tmp_path, most)
    one = measure(held_out, held_out[1].chunk_ids[:11], eval_mask_folds=3)
    main, other = (Evaluation(*np.load(tmp_path / f"{rank}.npz").values()) for rank in (0, 1))
    assert main.same_masks(one)
    np.testing.assert_allclose(main.nats, one.nats, rtol=1e-4, atol=1e-5)
    assert main.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert [column.dtype for column in other] == [column.dtype for column in main]
    assert other.masked == 0


@pytest.mark.slow
def test_a_process_without_memory_for_one_chunk_leaves_none_waiting(toy, tmp_path):
    printed = on_two_processes(toy, tmp_path, most=0)
    for rank in (0, 1):
        assert f"process {rank}: out of memory" in printed


COMPARING = """
import json, os, sys
from tests.scripts import load_script
script = load_script("evaluate")
def said(*given, compare=script.compare):
    print("compared on process", os.environ["RANK"])
    return compare(*given)
script.compare = said
print(json.dumps(script.main(sys.argv[1:])))
"""


@pytest.mark.slow
def test_two_processes_compare_on_the_main_one_alone_and_both_know_the_result(toy, tmp_path):
    (tmp_path / "program.py").write_text(COMPARING)
    texts = {"train_file": toy.train_file, "validation_file": toy.validation_file, "token_store": tmp_path}
    texts["allow_leaks"] = True
    models = {"model_name_or_path": toy.checkpoint, "compare": toy.checkpoint, "max_seq_length": 16}
    flags = [f"--{name}={value}" for name, value in (texts | models).items()]
    status, output, errors = run(TWO, flags, str(tmp_path / "program.py"))
    assert status == 0, errors
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("compared")] == ["compared on process 0"]
    one, other = (line for line in lines if line.startswith("{"))
    assert one == other
    assert json.loads(one)["gain"] == 1.0
