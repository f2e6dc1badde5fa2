"""benchmarks/speedrun: recipes resume as exactly as the loop does, data are frozen, chance seldom sets a record."""

import argparse
import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.stats import t

from benchmarks.speedrun import loop, run
from benchmarks.speedrun.ingredients import CUT, recut
from benchmarks.speedrun.records import losses, p_value, records
from mlm import cli
from mlm.data.batches import Batches
from mlm.data.chunks import concatenate
from mlm.data.masking import DROPOUT
from mlm.errors import UserError
from mlm.train import train as original
from tests.conftest import REPOSITORY
from tests.runs import ONE, TWO, assert_same_bits, assert_same_weights, changed_lines, cut_and_resumed, weights
from tests.runs import run as started

NAMES = sorted(path.stem for path in run.RECIPES.glob("*.yaml"))
WITH_INGREDIENTS = [name for name in NAMES if run.settings(name).keys() & vars(loop.Config().ingredients)]
OF_THE_RECIPE = ("--train_batch_size", "--learning_rate", "--dropout")


def configured(toy, folder, recipe="default", **flags):
    """The toy's run as a recipe has it."""
    words = [word for word in toy.flags(folder, **flags) if word.partition("=")[0] not in OF_THE_RECIPE]
    return cli.parse_config(loop.Config, [f"--config={run.RECIPES / recipe}.yaml", *words])


def test_without_ingredients_the_loop_is_the_original(toy, tmp_path):
    config = configured(toy, tmp_path / "run")
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(toy.config())}
    plain = type(toy.config())(**parts)
    ours = loop.train(config).model.state_dict()
    theirs = original(
        dataclasses.replace(plain, run=dataclasses.replace(plain.run, output_dir=str(tmp_path / "plain")))
    )
    assert_same_bits(ours, theirs.model.state_dict())


def test_the_loop_changes_at_most_thirty_lines():
    assert 0 < changed_lines("benchmarks/speedrun/loop.py") <= 30


# Other recipes are settings of train.py.
@pytest.mark.parametrize(
    "recipe",
    [
        name if name == "averaged_weights" else pytest.param(name, marks=pytest.mark.torture)
        for name in WITH_INGREDIENTS
    ],
)
def test_a_recipe_is_resumed_to_the_bit(toy, tmp_path, recipe):
    whole = loop.train(configured(toy, tmp_path / "whole", recipe)).model.state_dict()
    assert_same_bits(
        whole, cut_and_resumed(loop.train, configured(toy, tmp_path / "cut", recipe, checkpointing_steps=5))
    )


# Not Muon: torch's orthogonalises in bfloat16, where what differs by rounding comes to differ by more.
@pytest.mark.torture
@pytest.mark.parametrize("recipe", [name for name in WITH_INGREDIENTS if "muon_rate" not in run.settings(name)])
def test_a_recipe_is_the_same_on_one_process_and_two(toy, tmp_path, recipe):
    for processes in (ONE, TWO):
        words = [f"--config={run.RECIPES / recipe}.yaml", *toy.flags(tmp_path / str(processes))]
        status, _, errors = started(processes, [w for w in words if not w.startswith(OF_THE_RECIPE)], loop.__file__)
        assert status == 0, errors
    assert_same_weights(weights(tmp_path / "1"), weights(tmp_path / "2"))


@pytest.mark.torture
@pytest.mark.parametrize("recipe", WITH_INGREDIENTS)
def test_an_ingredient_trains_another_model_and_is_a_part_of_the_experiment(toy, tmp_path, recipe):
    with_it = loop.train(configured(toy, tmp_path / "run", recipe, checkpointing_steps=5)).model.state_dict()
    off = vars(loop.Config().ingredients)
    without = loop.train(configured(toy, tmp_path / "without", recipe, **off)).model.state_dict()
    assert any(not torch.equal(with_it[key], without[key]) for key in with_it)
    with pytest.raises(UserError, match="another experiment"):
        loop.train(configured(toy, tmp_path / "run", recipe, resume_from_checkpoint="latest", **off))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"mask_spans": True, "whole_word_mask": True}, "spans are of tokens here"),
        ({"average_share": 0.1, "load_best_model_at_end": True}, "the average of a run is saved, not the best"),
        ({"decay_share": 1.5}, "--decay_share 1.5: at most 1"),
        ({"recut_epochs": True, "line_by_line": True}, "of one text that is concatenated"),
    ],
)
def test_flags_that_do_not_go_with_an_ingredient_are_refused(toy, tmp_path, flags, reason):
    with pytest.raises(UserError, match=reason):
        configured(toy, tmp_path / "run", **flags)


def test_each_epoch_is_cut_at_another_offset_and_has_each_token_once(toy, tmp_path, monkeypatch):
    made, recut = [], loop.recut
    monkeypatch.setattr(loop, "recut", lambda batches: made.append(recut(batches)) or made[0])
    loop.train(configured(toy, tmp_path / "run", "recut", max_train_steps=1))
    [batches] = made
    n, T, seen = len(batches.chunks), batches.chunks.chunk_size, {}
    for step in range(3 * n // batches.global_batch):
        chunk_ids, epochs = batches.places(step)
        first = batches.chunks.places(chunk_ids, 0)  # [G], where each chunk begins in the text
        rows = batches.chunks.take(chunk_ids).ids
        assert all((batches.chunks.ids[f : f + T] == row).all() for f, row in zip(first, rows, strict=True))
        for f, epoch in zip(first, epochs, strict=True):
            seen.setdefault(int(epoch), []).append(int(f))
    offsets = [min(seen[epoch]) for epoch in range(2)]
    assert offsets[0] != offsets[1] and max(offsets) < T
    for epoch in range(2):
        assert sorted(seen[epoch]) == [offsets[epoch] + T * c for c in range(n)]


def test_text_whose_last_chunk_is_padded_is_recut_without_going_past_its_end():
    ids = np.arange(4 * 8 + 3, dtype=np.uint16)
    chunks = concatenate(ids, np.ones(len(ids), bool), 8, pad_id=0, remainder="pad")
    made = Batches(chunks, None, None, None, None, seed=1, global_batch=3)
    batches = recut(made)
    assert len(batches.chunks) == 3  # of four that are full
    for step in range(40):
        chunk_ids, _ = batches.places(step)
        assert batches.chunks.take(chunk_ids).ids.shape == (3, 8)


def test_the_offset_of_an_epoch_is_no_draw_of_any_processs_dropout():
    assert CUT > DROPOUT + 2**20


def test_a_learning_rate_is_held_and_falls_as_one_minus_a_root(toy):
    config = configured(toy, None, "wsd", decay_share=0.5)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))], lr=5e-4)
    schedule = loop.make_scheduler(optimizer, config, 8)
    rates = []
    for _ in range(9):
        rates.append(schedule.get_last_lr()[0] / 5e-4)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1 - math.sqrt(0.25), 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0])


def test_the_recipe_for_users_is_one_that_was_measured_but_for_learning_rate_and_batch():
    own = {"learning_rate", "train_batch_size", "per_device_train_batch_size"}
    measured = {name: value for name, value in run.settings("no_dropout_30").items() if name not in own}
    assert yaml.safe_load((REPOSITORY / "scripts" / "recipes" / "adapt.yaml").read_text()) == measured


def test_data_that_have_changed_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), file)
    digest = run.hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert run.checked(tmp_path, ("a.parquet", digest)) == file
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"a\.parquet: its SHA-256 begins with"):
        run.checked(tmp_path, ("a.parquet", digest))


def test_no_document_stands_in_two_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TRAIN", 30)
    monkeypatch.setattr(run, "HELD_OUT", 10)
    texts = {"train": [f"a document {i}" for i in range(40)], "held_out": [f"a document {i}" for i in range(30, 70)]}
    frozen = {"model": ("m/model.safetensors", b"weights")}
    (tmp_path / "m").mkdir()
    for name, documents in texts.items():
        pq.write_table(pa.table({"text": documents * 2}), tmp_path / f"{name}.parquet")
        frozen[name] = (f"{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    domain = run.Domain(**{k: (name, run.hashlib.sha256(b).hexdigest()[:16]) for k, (name, b) in frozen.items()})
    files = run.freeze(domain, tmp_path, tmp_path)
    read = {name: pq.read_table(files[name])["text"].to_pylist() for name in files if name != "model_name_or_path"}
    held_out = read["validation_file"] + read["dev_file"]
    assert [*map(len, read.values())] == [30, 10, 10]
    assert len(set(held_out)) == 20 and not set(held_out) & set(texts["train"])
    assert files["model_name_or_path"] == str(tmp_path / "m")
    assert "task" not in files, "there are no labels"


def test_documents_to_probe_with_are_others_and_keep_their_labels(tmp_path, monkeypatch):
    for name, value in {"TRAIN": 2, "HELD_OUT": 10, "LABELLED": 15}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "checked", lambda data, frozen: data / frozen[0])
    texts = [f"document {i}" for i in range(40)]
    pq.write_table(pa.table({"text": texts, "label": [i % 2 for i in range(40)]}), tmp_path / "held_out.parquet")
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "train.parquet")
    domain = run.Domain(("train.parquet", ""), ("held_out.parquet", ""), ("m/model.safetensors", ""))
    files = run.freeze(domain, tmp_path, tmp_path)
    task = pq.read_table(files["task"]).to_pydict()
    others = [
        text for name in ("validation_file", "dev_file") for text in pq.read_table(files[name])["text"].to_pylist()
    ]
    assert len(set(task["text"])) == 15 and not set(task["text"]) & set(others)
    assert all(label == int(text.split()[1]) % 2 for text, label in zip(task["text"], task["label"], strict=True))


def rows(**by_domain):
    """Runs of one pass: domain={"recipe": losses of seeds 1 …}."""
    return [
        {"domain": domain, "passes": 1, "recipe": recipe, "seed": seed, "settings": {}, "loss": loss}
        for domain, recipes in by_domain.items()
        for recipe, own in recipes.items()
        for seed, loss in enumerate(own, 1)
    ]


BASE = [4.20, 4.21, 4.19, 4.22, 4.18]
LOWER = [4.1, 4.112, 4.088, 4.121, 4.079]


def test_the_p_value_is_that_of_a_paired_one_sided_t_test():
    mine, its = dict(enumerate(LOWER, 1)), dict(enumerate(BASE, 1))
    differences = np.array(LOWER) - BASE
    statistic = differences.mean() / (differences.std(ddof=1) / math.sqrt(5))
    assert p_value(mine, its) == pytest.approx(t.cdf(statistic, 4))
    assert p_value(its, mine) == pytest.approx(1 - t.cdf(statistic, 4))
    assert math.isnan(p_value(mine, mine))
    assert math.isnan(p_value({1: 4.0, 2: 4.0}, {2: 4.1, 3: 4.1})), "one seed in common"


def test_a_record_is_taken_from_the_recipe_that_holds_it():
    lowest = [4.05, 4.064, 4.036, 4.072, 4.03]
    other = {"default": BASE, "second": BASE, "first": BASE, "third": BASE}
    measured = rows(imdb={"default": BASE, "first": LOWER, "second": LOWER, "third": lowest}, hotel=other)
    found = records(measured, "imdb", 1)
    assert [(record.recipe, record.before) for record in found] == [("first", "default"), ("third", "first")]
    assert all(record.p < 0.01 for record in found)
    assert records(measured, "hotel", 1) == []


@pytest.mark.parametrize(
    ("imdb", "hotel"),
    [
        (LOWER[:4], BASE),  # of four seeds
        (LOWER, BASE[:4]),
        (LOWER, []),
        (LOWER, [loss + 0.01 + 1e-4 * n for n, loss in enumerate(BASE)]),  # worse there
        ([4.1, 4.3, 4.1, 4.3, 4.19], BASE),  # chance
    ],
)
def test_what_is_not_shown_in_both_domains_is_no_record(imdb, hotel):
    assert records(rows(imdb={"default": BASE, "a": imdb}, hotel={"default": BASE, "a": hotel}), "imdb", 1) == []


def test_seeds_that_are_added_count_for_nothing():
    luck = [loss - 0.01 * (seed > 5) for seed, loss in enumerate([*BASE, *BASE], 1)]
    assert losses(rows(imdb={"a": luck}), "imdb", 1) == {"a": dict(enumerate(BASE, 1))}
    with pytest.raises(SystemExit):
        run.parse_arguments(["default", "--data", "folder", "--seeds", "6"])


def test_chance_seldom_sets_a_record():
    """A recipe that does nothing but draw other seeds: in both domains, of 300."""
    draws = np.random.default_rng(0).normal(4.2, 0.01, (300, 4, 5)).tolist()
    found = [
        records(rows(imdb={"default": a, "null": b}, hotel={"default": c, "null": d}), "imdb", 1)
        for a, b, c, d in draws
    ]
    assert sum(map(len, found)) <= 8  # three are expected


def test_a_recipe_counts_with_its_last_settings_alone():
    old, new = rows(imdb={"a": BASE}), rows(imdb={"a": LOWER[:2]})
    for row in new:
        row["settings"] = {"dropout": 0.0}
    assert losses(old + new, "imdb", 1) == {"a": {1: LOWER[0], 2: LOWER[1]}}


def test_a_run_is_not_repeated_unless_its_test_loss_or_its_probe_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "freeze", lambda *_: {})
    args = argparse.Namespace(
        domains=["imdb"], data=None, passes=[1], seeds=[1, 2], recipes=["default", "wsd"], dev=True
    )
    done = [{**job.key, "loss": None, "dev_loss": 4.0} for job in run.jobs(args, [], tmp_path / "a")][:3]
    assert [job.seed for job in run.jobs(args, done, tmp_path / "b")] == [2]
    args.dev, done[0]["loss"] = False, 4.1
    asked = [(job.seed, job.recipe) for job in run.jobs(args, done, tmp_path / "c")]
    assert asked == [(1, "wsd"), (2, "default"), (2, "wsd")]
    assert losses(done, "imdb", 1) == {"default": {1: 4.1}, "wsd": {}}
    monkeypatch.setattr(run, "freeze", lambda *_: {"task": "labelled.parquet"})
    asked = [(job.seed, job.recipe) for job in run.jobs(args, done, tmp_path / "d")]
    assert asked[0] == (1, "default"), "it has no probe yet"


@pytest.mark.torture
def test_both_sides_of_the_time_track_end_with_the_losses_of_what_they_have_trained(toy, tmp_path, monkeypatch):
    files = {"model_name_or_path": str(toy.checkpoint)}
    for name, source in (("train_file", toy.train_file), ("validation_file", toy.validation_file)):
        files[name] = str(tmp_path / f"{name}.parquet")
        texts = [f"{line} {name}" for line in source.read_text().splitlines()]  # none stands in both
        pq.write_table(pa.table({"text": texts}), files[name])
    files["dev_file"] = files["validation_file"]
    (tmp_path / "steps.yaml").write_text("max_train_steps: 3\ntrain_batch_size: 8\n")
    monkeypatch.setattr(run, "RECIPES", tmp_path)
    monkeypatch.setattr(run, "LENGTH", 16)
    for recipe in ("steps", run.PEER):
        row = run.race(run.Job("toy", 1, recipe, 1, files, tmp_path, test=True))
        assert 0 < row["loss"] < 10 and 0 < row["dev_loss"] < 10 and row["seconds"] > 0
        assert row["settings"] == run.settings(recipe) and row["recipe"] == recipe
