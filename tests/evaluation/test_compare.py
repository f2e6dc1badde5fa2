"""Before against after: sums that add up, intervals that cover, words that gained, and runs that keep it."""

import dataclasses
import json
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.interval_coverage import POPULATIONS, coverage
from mlm.data.chunks import ChunkConfig
from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
from mlm.data.token_store import TokenStoreConfig
from mlm.data.tokenizer import tokenizer_info
from mlm.engine.checkpoint import CheckpointConfig
from mlm.errors import UserError
from mlm.evaluation.breakdown import by_token, by_word, frequency_tenths
from mlm.evaluation.compare import compare, concentration, documents, in_words
from mlm.evaluation.eval_set import EvaluateConfig, make_eval_set
from mlm.evaluation.evaluate import GRID, Evaluation, evaluate
from mlm.evaluation.interval import interval, student
from mlm.model.load import ModelConfig
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.run_directory import RunConfig
from mlm.train import train
from tests.data.stores import build
from tests.scripts import load_script
from tests.test_pipeline import script
from tests.tokenizers_for_tests import wordpiece

evaluator = load_script("evaluate")
# Long words that the vocabulary has in pieces, some of them twice in a document.
WORDS = ["the", "old", "fox", "unbelievably", "likes", "sour", "grapes", "whenever", "owl", "undrinkable"]


class World:
    """A text of thirty documents, two models, and their evaluations under two seeds of three folds each."""

    def __init__(self, toy, folder, **chunking):
        rng = random.Random(1)
        self.documents = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(30)]
        self.tokenizer = wordpiece(["the old fox likes the young owl"] * 9, 120)
        info = tokenizer_info(self.tokenizer)
        store = build(self.documents, self.tokenizer, info, folder, {"split": "validation"})
        config = EvaluateConfig(eval_mask_folds=3, eval_mask_seeds=2)
        self.eval_set = make_eval_set("text", store, ChunkConfig(**chunking), 16, info, config)
        self.counts = store.token_counts
        base, adapted = (toy.new_model(self.tokenizer) for _ in range(2))
        adapted.cls.predictions.bias.data[:60] += 0.5
        self.before, self.after = (
            evaluate(SparseMaskedLM(model), self.eval_set, Accelerator(cpu=True)) for model in (base, adapted)
        )

    def compare(self, after=None):
        return compare(self.eval_set, self.before, after or self.after, self.tokenizer, self.counts)


@pytest.fixture(scope="module", params=[{"remainder": "pad"}, {"line_by_line": True}], ids=["concat", "lines"])
def world(toy, tmp_path_factory, request):
    return World(toy, tmp_path_factory.mktemp("world"), **request.param)


def test_breakdowns_add_up_to_the_overall_nats_and_counts_exactly(world):
    found = world.compare()["breakdowns"]
    assert set(found) == {"frequency", "word", "position"}
    for rows in found.values():
        assert sum(row["count"] for row in rows) == world.before.masked
        assert sum(row["nats_before"] for row in rows) == world.before.nats.sum()
        assert sum(row["nats_after"] for row in rows) == world.after.nats.sum()
    assert sum(row["count"] > 0 for row in found["position"]) >= 9  # a line's last token is a special one
    assert all(row["count"] > 0 for row in found["word"])
    table = documents("held_out", world.eval_set, world.before, world.after, world.tokenizer)
    assert sum(table["masked_tokens"].to_pylist()) == world.before.masked
    assert sum(table["nats_after"].to_pylist()) == world.after.nats.sum()


def test_an_untouched_model_gains_exactly_nothing(world):
    found = world.compare(after=world.before)
    assert found["gain"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert found["difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert found["tokens"] == found["words"] == {"gained": [], "lost": []}


def test_the_gain_is_the_ratio_of_perplexities_inside_its_interval(world):
    found = world.compare()
    low, high = found["gain"]["interval"]
    assert found["gain"]["value"] == pytest.approx(world.before.perplexity / world.after.perplexity)
    assert low < found["gain"]["value"] < high
    assert found["difference"]["value"] == pytest.approx(world.after.loss - world.before.loss)
    assert found["interval"] == {
        **{"method": "jackknife", "confidence": 0.95, "unit": "documents"},
        "units": found["masks"]["documents"],
    }
    assert found["bootstrap"] == found["interval"], "under the name that scripts may read"
    assert world.compare() == found


def slow_sums(world, key):
    """{key(document, token's place): [occurrences, nats before, nats after]}, prediction by prediction."""
    sums, seen = defaultdict(lambda: [0, 0.0, 0.0]), set()
    for i in range(world.before.masked):
        chunk, column = int(world.before.chunk[i]), int(world.before.column[i])
        offsets = world.eval_set.chunks.document_offsets
        place = column + (chunk * 16 if offsets is None else int(offsets[chunk]))
        name, occurrence = key(place)
        occurrence = (
            int(world.before.mask_round[i]) // 3,
            occurrence,
        )  # three folds of a seed count an occurrence once
        sums[name][0] += occurrence not in seen
        seen.add(occurrence)
        sums[name][1] += float(world.before.nats[i])
        sums[name][2] += float(world.after.nats[i])
    return sums


def listed(found):
    rows = [*found["gained"], *found["lost"]]
    return {row["text"]: [row["count"], row["nats_before"], row["nats_after"]] for row in rows}


def assert_sorted(found):
    for name, sign in (("gained", 1), ("lost", -1)):
        moved = [sign * (row["nats_before"] - row["nats_after"]) for row in found[name]]
        assert moved == sorted(moved, reverse=True)
        assert all(move > 0 for move in moved)


def test_tokens_that_gained_and_lost_are_those_of_a_slow_count(world):
    ids = world.eval_set.store.ids
    expected = slow_sums(world, lambda place: (world.tokenizer.decode([ids[place]]), place))
    found = by_token(world.tokenizer, world.before, world.after)
    assert_sorted(found)
    assert len(listed(found)) > 20
    assert listed(found) == {text: expected[text] for text in listed(found)}


def test_words_that_gained_and_lost_are_those_of_a_slow_count(world):
    """A word of the text is found by splitting it at its blanks; each is one to ten tokens here."""
    word_at = {}
    for number, document in enumerate(world.documents):
        place = int(world.eval_set.store.document_offsets[number]) + 1
        for k, word in enumerate(document.split()):
            for _ in world.tokenizer(word, add_special_tokens=False)["input_ids"]:
                word_at[place] = (word, (number, k))
                place += 1
    found = by_word(world.eval_set, world.tokenizer, world.before, world.after)
    assert_sorted(found)
    assert listed(found) == slow_sums(world, word_at.__getitem__)
    assert set(listed(found)) == set(WORDS)


def test_nats_belong_to_the_document_of_their_token(world):
    """Chunks of concatenated text hold several documents."""
    offsets = world.eval_set.store.document_offsets
    table = documents("held_out", world.eval_set, world.before, world.after, world.tokenizer).to_pylist()
    found = {row["document"]: [row["masked_tokens"], row["nats_before"], row["nats_after"]] for row in table}
    assert found == slow_sums(world, lambda p: (next(d for d in range(30) if p < offsets[d + 1]), p))
    for row in table:
        assert world.documents[row["document"]].startswith(row["opening"].split(" ")[0])
        assert row["text"] == "held_out"


@pytest.mark.parametrize("header", [{"words": None}, {"words": 3}], ids=["slow tokenizer", "no spaces"])
def test_where_the_tokenizer_sees_no_words_none_are_listed(world, header):
    store = dataclasses.replace(world.eval_set.store, header={**world.eval_set.store.header, **header})
    text = dataclasses.replace(world.eval_set, store=store)
    found = compare(text, world.before, world.after, world.tokenizer, counts=None)
    assert found["words"] is None
    assert set(found["breakdowns"]) == {"position"}, "nor of frequencies in a corpus that is not known"
    assert found["tokens"] == world.compare()["tokens"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.data())
def test_frequency_tenths_are_those_of_a_slow_count(counts, data):
    maskable = np.array(data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts))))
    found = frequency_tenths(np.array(counts), maskable)
    ranked = sorted((i for i in range(len(counts)) if maskable[i]), key=lambda i: (-counts[i], i))
    total, above = sum(counts[i] for i in ranked), 0
    for i in ranked:
        assert found[i] == (min(10 * above // total, 9) if total else 0)
        above += counts[i]


def slow_bootstrap(difference, count, resamples, rng):
    losses = []
    for _ in range(resamples):
        drawn = [rng.randrange(len(count)) for _ in count]
        losses.append(sum(difference[i] for i in drawn) / sum(count[i] for i in drawn))
    losses.sort()
    return losses[round(0.025 * resamples)], losses[round(0.975 * resamples) - 1]


def documents_drawn(rng, units, mean):
    """Documents that differ in length and, as documents do, in how much they gain."""
    count = rng.integers(1, 60, units)
    own = rng.normal(mean, 0.3, units)
    return count, count * own + rng.normal(0, np.sqrt(count))


@pytest.mark.parametrize("documents", [5, 6, 17, 200])
def test_the_interval_leaves_out_one_document_after_the_other(documents):
    """Against a slow jackknife, with scipy's Student's t."""
    count, difference = documents_drawn(np.random.default_rng(documents), documents, -0.2)
    whole = difference.sum() / count.sum()
    without = [np.delete(difference, i).sum() / np.delete(count, i).sum() for i in range(documents)]
    error = math.sqrt(sum((part - whole) ** 2 for part in without))
    worth = count.sum() ** 2 / sum(int(c) ** 2 for c in count)
    half = scipy.stats.t.ppf(0.975, worth - 1) * error
    assert interval(difference, count) == pytest.approx((whole - half, whole + half), abs=1e-6 * half)


@given(st.floats(1, 1e7))
def test_student_s_t_is_scipys(freedom):
    assert student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-3)


def test_of_many_documents_the_interval_is_that_of_a_slow_bootstrap():
    count, difference = documents_drawn(np.random.default_rng(0), 400, -0.2)
    slow = slow_bootstrap(difference.tolist(), count.tolist(), 4000, random.Random(0))
    width = slow[1] - slow[0]
    assert interval(difference, count) == pytest.approx(slow, abs=0.06 * width)


def test_of_many_documents_the_interval_is_scipys():
    count, difference = documents_drawn(np.random.default_rng(1), 600, -0.2)
    found = scipy.stats.bootstrap(
        (difference, count),
        lambda d, c, axis: d.sum(axis=axis) / c.sum(axis=axis),
        **{"paired": True, "n_resamples": 10_000, "method": "percentile", "rng": np.random.default_rng(0)},
    ).confidence_interval
    width = found.high - found.low
    assert interval(difference, count) == pytest.approx((found.low, found.high), abs=0.03 * width)


@pytest.mark.parametrize("documents", [5, 10, 60])
@pytest.mark.parametrize("population", POPULATIONS)
def test_the_interval_covers_the_truth_about_as_often_as_it_says(population, documents):
    """Also of few documents, of very different lengths, or with a few that gain the most."""
    assert 0.92 < coverage(population, documents, 2000, seed=2) < 0.985


@pytest.mark.parametrize("documents", [0, 1, 2, 4])
def test_fewer_than_five_documents_have_no_interval(documents):
    count, difference = documents_drawn(np.random.default_rng(0), documents, -0.2)
    assert all(math.isnan(end) for end in interval(difference, count))


def test_an_infinite_loss_has_no_interval():
    assert all(math.isnan(end) for end in interval(np.array([math.inf, 1, 2, 3, 4, 5]), np.ones(6, int)))


def test_documents_are_left_out_not_tokens():
    """The same nats, in documents that differ and in documents that are all alike: the first know less."""
    count = np.full(40, 50)
    differing = np.where(np.arange(40) % 2, 30.0, -50.0)
    alike = np.full(40, differing.mean())
    (low, high), narrow = interval(differing, count), interval(alike, count)
    assert narrow == pytest.approx((-0.2, -0.2))
    assert high - low > 0.4


def test_a_gain_of_four_documents_is_not_said_to_be_sure(toy, tmp_path):
    """Nor is anything that hangs on it."""
    world = World(toy, tmp_path, remainder="pad")
    ids = len(world.eval_set.store.ids)
    four = dataclasses.replace(world.eval_set.store, document_offsets=np.array([0, 90, 150, 270, ids]))
    world.eval_set = dataclasses.replace(world.eval_set, store=four)
    nats = np.maximum(world.before.nats - 2, 0)
    found = world.compare(after=world.before._replace(nats=nats))
    assert found["gain"]["value"] > 4
    assert found["gain"]["interval"] == found["difference"]["interval"] == [None, None]
    assert found["concentration"] is None
    assert "no interval: 4 documents, fewer than 5" in in_words(found)


def test_one_document_is_measured_by_its_chunks(toy, tmp_path):
    world = World(toy, tmp_path, remainder="pad")
    book = dataclasses.replace(world.eval_set.store, document_offsets=np.array([0, len(world.eval_set.store.ids)]))
    world.eval_set = dataclasses.replace(world.eval_set, store=book)
    found = world.compare()
    assert (found["bootstrap"]["unit"], found["masks"]["documents"]) == ("chunks", 1)
    assert found["bootstrap"]["units"] == len(world.eval_set.chunks)
    assert f"from {len(world.eval_set.chunks)} chunks of one document)" in in_words(found)
    assert found["gain"]["interval"][0] < found["gain"]["value"] < found["gain"]["interval"][1]


def test_folds_measure_a_text_of_fewer_tokens_than_folds_and_refuse_one_without_any(world, tmp_path):
    info, config = world.eval_set.info, EvaluateConfig(eval_mask_folds=16)

    def rounds(text, seed):
        store = build([text], world.tokenizer, info, tmp_path / f"{text}{seed}", {"split": "validation"})
        folds = dataclasses.replace(config, eval_mask_seed=seed)
        eval_set = make_eval_set("text", store, ChunkConfig(line_by_line=True), 16, info, folds)
        return [len(eval_set.batch(eval_set.chunk_ids, fold).positions) for fold in range(16)]

    by_seed = [rounds("the", seed) for seed in range(3)]
    assert all(sum(masked) == 1 for masked in by_seed)
    assert any(masked[0] == 0 for masked in by_seed)
    with pytest.raises(UserError, match=r"no token in 1 chunks is masked, .* measured; give more text$"):
        rounds("\u2603", 0)


# A gain in a handful of tokens


def one_document_each(rng, kinds, gains, M=4000, documents=40):
    """Evaluations before and after of M tokens, 0 … kinds - 1; token k gains gains[k] nats on average."""
    target = rng.integers(0, kinds, M).astype(np.int32)
    document = np.sort(rng.integers(0, documents, M))
    before = np.round(rng.gamma(3, 1, M) * GRID) / GRID
    after = np.round((before - np.array(gains)[target] + rng.normal(0, 0.1, M)) * GRID) / GRID
    places = (np.zeros(M, np.int32), document.astype(np.int32), np.arange(M, dtype=np.int32), target)
    hit = np.zeros(M, bool)
    return Evaluation(*places, before, hit), Evaluation(*places, after, hit), document


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def convert_ids_to_tokens(self, i):
        return chr(97 + i)


def slow_gain(before, after, without):
    rest = [i for i in range(before.masked) if before.target[i] not in without]
    nats = sum(float(before.nats[i]) - float(after.nats[i]) for i in rest)
    return math.exp(nats / len(rest))


def test_a_gain_that_a_few_tokens_carry_is_reported_with_what_is_left_without_them():
    gains = [0.02] * 20
    gains[3], gains[7], gains[11] = 1.0, 0.5, 0.2
    before, after, document = one_document_each(np.random.default_rng(0), 20, gains)
    few = concentration(before, after, document, Letters())
    assert few["types"] == ["d", "h", "l"]
    nats = before.nats - after.nats
    assert few["share"] == pytest.approx(nats[np.isin(before.target, [3, 7, 11])].sum() / nats.sum())
    assert few["gain_without"] == pytest.approx(slow_gain(before, after, {3, 7, 11}))
    low, high = few["gain_without_interval"]
    assert 1 < low < few["gain_without"] < high < slow_gain(before, after, ())


@pytest.mark.parametrize(
    "gains",
    [[0.2] * 20, [0.2] * 12 + [0.0] * 8, [-0.2] * 20, [0.0] * 20],
    ids=["spread over all", "over half of them", "lost", "nothing"],
)
def test_a_gain_that_many_tokens_share_is_not_called_concentrated(gains):
    before, after, document = one_document_each(np.random.default_rng(1), 20, gains)
    if not any(gains):
        after = before
    assert concentration(before, after, document, Letters()) is None


def test_a_share_is_more_than_all_where_the_other_tokens_have_lost():
    before, after, document = one_document_each(np.random.default_rng(2), 20, [4.0] + [-0.1] * 19)
    few = concentration(before, after, document, Letters())
    assert few["types"] == ["a"]
    assert few["share"] > 1 > few["gain_without"]


def test_nothing_is_left_where_few_tokens_are_all_there_are():
    before, after, document = one_document_each(np.random.default_rng(3), 3, [0.5, 0.5, 0.5])
    few = concentration(before, after, document, Letters())
    assert sorted(few["types"]) == ["a", "b", "c"]
    assert few["share"] == 1
    assert few["gain_without"] == 1
    assert all(math.isnan(end) for end in few["gain_without_interval"])


def test_a_gain_within_the_noise_is_not_called_concentrated(world):
    """Two models that differ by chance: a part of next to nothing can be any number."""
    nats = np.round((world.before.nats + np.random.default_rng(0).normal(-0.01, 1, world.before.masked)) * GRID)
    found = world.compare(after=world.before._replace(nats=nats / GRID))
    assert found["gain"]["interval"][0] < 1 < found["gain"]["value"]
    assert found["concentration"] is None


# In a run


def comparison(folder):
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def out_of_domain_file(tmp_path_factory):
    """Text outside the toy's domain: its words in an order that teaches nothing."""
    rng, path = random.Random(5), tmp_path_factory.mktemp("general") / "general.txt"
    words = ["the", "old", "young", "cat", "dog", "cow", "likes", "milk", "bones", "grass", "every", "day"]
    path.write_text("".join(f"{' '.join(rng.choices(words, k=9))}\n" for _ in range(40)))
    return path


def with_out_of_domain(toy, out_of_domain_file, folder, **loop):
    modules = {
        "out_of_domain": OutOfDomainConfig(out_of_domain_file=str(out_of_domain_file)),
        "evaluate": EvaluateConfig(eval_mask_folds=3, eval_mask_seeds=2),
    }
    return toy.config(folder, modules=modules, **loop)


def test_a_run_says_what_it_gained_and_what_it_forgot(toy, out_of_domain_file, tmp_path, capsys):
    folder = tmp_path / "run"
    found = train(with_out_of_domain(toy, out_of_domain_file, folder, max_train_steps=100, eval_steps=40)).results
    written = comparison(folder)
    for name, prefix in (("held_out", ""), ("out_of_domain", "out_of_domain_")):
        row = written[name]
        assert [found[f"{prefix}gain{end}"] for end in ("", "_low", "_high")] == [
            row["gain"]["value"],
            *row["gain"]["interval"],
        ]
        assert row["after"]["perplexity"] == found[f"{prefix}perplexity"]
        assert row["before"]["perplexity"] == found[f"{prefix}perplexity_before"]
        assert row["gain"]["value"] == pytest.approx(
            found[f"{prefix}perplexity_before"] / found[f"{prefix}perplexity"]
        )
        assert row["masks"]["seeds"] == [0, 1] and row["masks"]["folds"] == 3
    assert found["gain_low"] > 1
    assert found["out_of_domain_gain"] < found["gain"]
    by_seed = written["held_out"]["after"]["perplexity_by_seed"]
    assert found["perplexity_spread"] == max(by_seed) - min(by_seed) > 0
    assert {
        "bits_per_character",
        "bits_per_word",
        "out_of_domain_eval_loss",
        "out_of_domain_eval_loss_before",
    } <= found.keys()

    table = pq.read_table(folder / "documents.parquet").to_pylist()
    masked = Counter()
    for row in table:
        masked[row["text"]] += row["masked_tokens"]
    assert masked == {name: written[name]["masks"]["masked_tokens"] for name in ("held_out", "out_of_domain")}
    few = written["held_out"]["concentration"]  # eight tokens of each sentence, five of them always the same
    assert {"the", "likes", "every", "day", "."} & set(few["types"])
    assert found["gain_without_concentrated"] == few["gain_without"]
    assert ("out_of_domain_gain_without_concentrated" in found) == (
        written["out_of_domain"]["concentration"] is not None
    )

    printed = capsys.readouterr().out.splitlines()
    assert any(
        f"{few['share']:.0%} of it ({' '.join(few['types'])}), on all others it is {few['gain_without']:.4g}" in line
        for line in printed
    )
    assert sum(line.startswith("held-out text:") and "95% interval" in line for line in printed) == 1
    assert sum(line.startswith("out-of-domain text:") and "95% interval" in line for line in printed) == 1


def test_evaluations_during_training_are_of_the_first_mask_round(toy, out_of_domain_file, tmp_path):
    train(with_out_of_domain(toy, out_of_domain_file, tmp_path / "run", eval_steps=5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [(line["step"], line["eval_masked_tokens"]) for line in lines if line["event"] == "eval"]
    assert [step for step, _ in seen] == [0, 5, 10, 12]
    assert len({masked for _, masked in seen}) == 1
    assert seen[0][1] < comparison(tmp_path / "run")["held_out"]["masks"]["masked_tokens"] / 4
    tokens = [line["tokens"] for line in lines if line["event"] in ("train", "eval")]
    assert tokens == sorted(tokens)
    assert (tokens[0], tokens[-1]) == (0, 12 * 8 * 16)


def test_an_out_of_domain_text_is_measured_as_it_is_on_its_own(toy, out_of_domain_file, tmp_path):
    found = train(with_out_of_domain(toy, out_of_domain_file, tmp_path / "run", max_train_steps=3)).results
    modules = {
        "model": ModelConfig(model_name_or_path=str(tmp_path / "run")),
        "corpus": CorpusConfig(train_file=str(toy.train_file), validation_file=str(out_of_domain_file)),
        "evaluate": EvaluateConfig(eval_mask_folds=3, eval_mask_seeds=2),
    }
    config = toy.config(tmp_path / "alone", modules=modules, max_train_steps=None, num_train_epochs=0)
    alone = train(config).results
    assert alone["perplexity"] == found["out_of_domain_perplexity"]
    assert alone["eval_loss"] == found["out_of_domain_eval_loss"]


def test_a_run_without_an_evaluation_before_compares_nothing(toy, tmp_path):
    found = train(toy.config(tmp_path / "run", eval_on_start=False)).results
    assert not {"gain", "perplexity_before"} & found.keys()
    assert not list((tmp_path / "run").glob("comparison*")) + list((tmp_path / "run").glob("documents*"))


def test_no_step_is_no_gain(toy, tmp_path):
    found = train(toy.config(tmp_path / "run", max_train_steps=None, num_train_epochs=0)).results
    assert (found["gain"], found["gain_low"], found["gain_high"]) == (1.0, 1.0, 1.0)


def test_the_best_weights_are_those_that_are_compared(toy, out_of_domain_file, tmp_path):
    """A learning rate that ruins the model: the best weights are the untouched ones, on every text."""
    loop = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "eval_steps": 1, "max_train_steps": 3}
    config = with_out_of_domain(toy, out_of_domain_file, tmp_path / "run", load_best_model_at_end=True, **loop)
    found = train(config).results
    assert (found["gain"], found["out_of_domain_gain"]) == (1.0, 1.0)


def test_a_resumed_run_compares_with_what_was_before_the_first_step(toy, out_of_domain_file, tmp_path):
    folder = tmp_path / "run"
    config = with_out_of_domain(toy, out_of_domain_file, folder)
    train(dataclasses.replace(config, checkpoint=CheckpointConfig(checkpointing_steps=6)))
    first, documents_then = comparison(folder), (folder / "documents.parquet").read_bytes()
    for file in ("comparison.json", "documents.parquet", "all_results.json"):
        (folder / file).unlink()
    goes_on = CheckpointConfig(resume_from_checkpoint=str(folder / "checkpoints" / "step_6"))
    found = train(dataclasses.replace(config, checkpoint=goes_on)).results
    assert comparison(folder) == first
    assert (folder / "documents.parquet").read_bytes() == documents_then
    assert found["gain"] == first["held_out"]["gain"]["value"]


def test_an_out_of_domain_text_that_cannot_be_is_refused_in_words(toy, tmp_path):
    with pytest.raises(UserError, match="--out_of_domain_file and --out_of_domain_dataset_name: give one of the two"):
        OutOfDomainConfig(out_of_domain_file="a.txt", out_of_domain_dataset_name="b")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"^--out_of_domain_file .*empty\.txt is empty"):
        train(with_out_of_domain(toy, tmp_path / "empty.txt", tmp_path / "run"))
    (tmp_path / "short.txt").write_text("the cat\n")
    with pytest.raises(UserError, match=r"short\.txt: .*less than one chunk"):
        train(with_out_of_domain(toy, tmp_path / "short.txt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_of_an_out_of_domain_data_set_the_held_out_part_alone_is_tokenised(toy, out_of_domain_file, tmp_path):
    """A folder with a training split as well, which may be all of Wikipedia."""
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.txt").write_text(out_of_domain_file.read_text())
    modules = {
        "out_of_domain": OutOfDomainConfig(out_of_domain_dataset_name=str(tmp_path / "data")),
        "token_store": TokenStoreConfig(token_store=str(tmp_path / "stores")),
    }
    config = toy.config(tmp_path / "run", modules=modules, max_train_steps=1)
    by_file = dataclasses.replace(config, out_of_domain=OutOfDomainConfig(out_of_domain_file=str(out_of_domain_file)))
    found = train(config).results
    assert sorted(path.name for path in (tmp_path / "stores").glob("*/train")) == ["train"], "the domain's"
    by_file = dataclasses.replace(by_file, run=RunConfig(output_dir=str(tmp_path / "by_file")))
    assert train(by_file).results["out_of_domain_eval_loss"] == found["out_of_domain_eval_loss"]


# In bits per character, between tokenizers


def in_bits(world, measured):
    """The half of the interval over World's text of two models, (eval set, evaluation) each."""
    found = (evaluator.Measured(world.tokenizer, {}, {"held_out": text}, {"held_out": own}) for text, own in measured)
    return evaluator.half_width_in_bits(*found, "held_out")


def test_the_interval_in_bits_is_that_of_the_loss_where_tokenizers_are_the_same(toy, tmp_path):
    world = World(toy, tmp_path, remainder="pad")  # no token is left out, and each is predicted once
    half, documents = in_bits(world, [(world.eval_set, world.before), (world.eval_set, world.after)])
    low, high = world.compare()["difference"]["interval"]
    header = world.eval_set.store.header
    in_nats = half * math.log(2) * header["characters"] / header["maskable_tokens"]
    assert (in_nats, documents) == (pytest.approx((high - low) / 2), 30)


def test_the_interval_in_bits_leaves_each_document_out_of_both_texts(toy, tmp_path):
    world = World(toy, tmp_path / "small", remainder="pad")
    tokenizer = wordpiece(world.documents, 400)  # with fewer pieces a word
    info = tokenizer_info(tokenizer)
    store = build(world.documents, tokenizer, info, tmp_path / "large", {"split": "validation"})
    other = make_eval_set("text", store, ChunkConfig(remainder="pad"), 16, info, EvaluateConfig(eval_mask_folds=3))
    after = evaluate(SparseMaskedLM(toy.new_model(tokenizer)), other, Accelerator(cpu=True))

    def of_documents(eval_set, evaluation, skipped=None):
        """Nats of all tokens but those of document `skipped`, and their number: each is predicted once a seed."""
        offsets, place = eval_set.store.document_offsets, evaluation.chunk * 16 + evaluation.column
        document = np.searchsorted(offsets, place, side="right") - 1
        nats = evaluation.nats[document != skipped]
        return nats.sum() / eval_set.config.eval_mask_seeds, len(nats) / eval_set.config.eval_mask_seeds

    both = (world.eval_set, world.before), (other, after)
    all_tokens, characters = of_documents(*both[0])[1], world.eval_set.store.header["characters"]
    differences, lengths = [], []
    for skipped in (None, *range(30)):
        (nats, tokens), (nats_after, _) = (of_documents(*of, skipped) for of in both)
        differences.append((nats_after - nats) / math.log(2) / (characters * tokens / all_tokens))
        lengths.append(all_tokens - tokens)
    worth = sum(lengths) ** 2 / sum(length**2 for length in lengths)
    spread = math.sqrt(sum((value - differences[0]) ** 2 for value in differences[1:]))
    half, _ = in_bits(world, both)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, worth - 1) * spread)


def test_there_is_no_interval_in_bits_where_each_tokenizer_was_measured_on_other_chunks(toy, tmp_path):
    world = World(toy, tmp_path, remainder="pad")
    few = dataclasses.replace(world.eval_set, config=EvaluateConfig(max_eval_samples=5))
    assert math.isnan(in_bits(world, [(few, world.before), (few, world.after)])[0])


# On the command line


@pytest.mark.slow
def test_two_checkpoints_are_compared_on_the_command_line(toy, out_of_domain_file, tmp_path):
    train(toy.config(tmp_path / "adapted", max_train_steps=100))
    flags = [
        *("--train_file", toy.train_file, "--validation_file", toy.validation_file, "--max_seq_length", 16),
        *("--token_store", toy.checkpoint.parent / "stores", "--out_of_domain_file", out_of_domain_file),
        *("--compare", toy.checkpoint, "--output", tmp_path / "found.json", "--allow_leaks"),
    ]
    found, printed = script("evaluate", "--model_name_or_path", tmp_path / "adapted", *flags)
    run = json.loads((tmp_path / "adapted" / "all_results.json").read_text())
    assert {name: found[name] for name in ("gain", "gain_low", "gain_high")} == {
        name: run[name] for name in ("gain", "gain_low", "gain_high")
    }
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["held_out"] == comparison(tmp_path / "adapted")["held_out"]
    forgot = written["out_of_domain"]
    assert found["out_of_domain_gain"] == forgot["gain"]["value"] != 1
    assert found["out_of_domain_perplexity"] == forgot["after"]["perplexity"]
    assert found["out_of_domain_perplexity_before"] == forgot["before"]["perplexity"]
    assert "95% interval" in printed
    alone, _ = script("evaluate", "--model_name_or_path", tmp_path / "adapted", *flags[:-5], "--allow_leaks")
    assert alone["out_of_domain_perplexity"] == found["out_of_domain_perplexity"] != alone["perplexity"]

    tokenizer = wordpiece(["the old cat likes milk every day ."] * 3, 150)
    tokenizer.save_pretrained(tmp_path / "other")
    toy.new_model(tokenizer).save_pretrained(tmp_path / "other")
    other, printed = script("evaluate", "--model_name_or_path", tmp_path / "other", *flags)
    assert "gain" not in other
    assert "bits per character and per word are" in printed
    assert other["bits_per_character"] != other["bits_per_character_before"]
    assert other["bits_per_character_before"] == pytest.approx(run["bits_per_character_before"])
    change = other["bits_per_character"] - other["bits_per_character_before"]
    assert other["difference_in_bits"] == pytest.approx(change)
    assert other["difference_low"] < change < other["difference_high"]
    change = other["out_of_domain_bits_per_character"] - other["out_of_domain_bits_per_character_before"]
    assert other["out_of_domain_difference_in_bits"] == pytest.approx(change)


@pytest.mark.parametrize("flag", ["mlm_probability", "whole_word_mask"])
def test_a_flag_of_training_s_masks_is_answered_with_that_of_evaluation_s(toy, flag):
    with pytest.raises(UserError, match=f"--eval_{flag}"):
        evaluator.main([f"--{flag}=1", "--model_name_or_path", str(toy.checkpoint)])
