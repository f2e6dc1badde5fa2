"""Training on a mixture of sources: resumed to the bit, the same on any number of processes, and told apart."""

import dataclasses
import json
import random
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlm.data.corpus import CorpusConfig
from mlm.data.order import seen_before
from mlm.data.token_store import prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.engine.checkpoint import CheckpointConfig
from mlm.errors import UserError
from mlm.report.report import write_report
from mlm.report.run_record import read_runs
from mlm.train import train
from tests.engine.test_faults import poisoned
from tests.runs import ONE, TWO, assert_same_bits, assert_same_weights, metrics, run, weights
from tests.scripts import load_script


@pytest.fixture(scope="module")
def general(toy, tmp_path_factory):
    """Two files of text that is not the toy's."""
    rng, files = random.Random(1), [tmp_path_factory.mktemp("general") / name for name in ("a.txt", "b.txt")]
    for file in files:
        lines = (" ".join(rng.choices(["milk", "bones", "day", "every", "old", "."], k=9)) for _ in range(60))
        file.write_text("".join(f"{line}\n" for line in lines))
    return [str(file) for file in files]


def test_a_mixture_is_resumed_to_the_bit(toy, general, tmp_path):
    settings = {"replay_file": tuple(general), "replay_share": (0.2, 0.15)}
    whole = train(toy.config(tmp_path / "whole", **settings))
    config = toy.config(tmp_path / "cut", checkpointing_steps=5, **settings)
    train(config)
    (tmp_path / "cut" / "all_results.json").unlink()  # as a kill at the end leaves it
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    resumed = train(dataclasses.replace(config, checkpoint=latest))
    assert [line["step"] for line in metrics(tmp_path / "cut", "start")] == [0, 10]
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    for name in ("domain", "replay_1", "replay_2"):
        assert resumed.results[f"train_loss_{name}"] == whole.results[f"train_loss_{name}"]
    alone = train(toy.config(tmp_path / "alone")).model.state_dict()
    assert any(not torch.equal(tensor, alone[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.slow
def test_a_mixture_is_the_same_on_one_two_and_three_processes(toy, general, tmp_path):
    flags = {"train_batch_size": 11, "per_device_train_batch_size": 4, "eval_steps": 6, "replay_share": 0.3}
    flags = {**flags, "replay_file": general[0]}
    one = {}
    for processes in (ONE, TWO, 3):
        folder = tmp_path / str(processes)
        status, _, errors = run(processes, toy.flags(folder, **flags))
        assert status == 0, errors
        [end] = metrics(folder, "end")
        one = one or {"weights": weights(folder), **end}
        assert_same_weights(weights(folder), one["weights"])
        for name in ("perplexity", "train_loss", "train_loss_domain", "train_loss_replay"):
            assert end[name] == pytest.approx(one[name], rel=1e-4)
        assert end["replay_epochs"] == one["replay_epochs"] > 0


def test_the_loss_of_each_source_is_its_own(toy, general, tmp_path):
    """Of a model that knows the domain, and stays as it is, so that a text's loss is the same in each run."""
    train(toy.config(tmp_path / "adapted", max_train_steps=40))
    settings = {"learning_rate": 1e-12, "train_batch_size": 8, "max_train_steps": 40}
    settings |= {"model_name_or_path": str(tmp_path / "adapted"), "eval_steps": 100}
    mixed = train(toy.config(tmp_path / "mixed", replay_file=general[0], replay_share=0.25, **settings)).results
    domain = train(toy.config(tmp_path / "domain", **settings)).results
    other = train(toy.config(tmp_path / "other", **{**settings, "train_file": general[0]})).results
    assert other["train_loss"] > 1.2 * domain["train_loss"]
    assert mixed["train_loss_domain"] == pytest.approx(domain["train_loss"], rel=0.05)
    assert mixed["train_loss_replay"] == pytest.approx(other["train_loss"], rel=0.05)
    part = (mixed["train_loss"] - mixed["train_loss_domain"]) / (
        mixed["train_loss_replay"] - mixed["train_loss_domain"]
    )
    assert part == pytest.approx(0.25, abs=0.05)
    assert not {"train_loss_domain", "replay_epochs"} & domain.keys()


def test_a_line_of_the_log_without_a_source_has_no_loss_of_it(toy, general, tmp_path):
    config = toy.config(tmp_path / "run", replay_file=general[0], replay_share=0.1, logging_steps=1,
                        train_batch_size=4, max_train_steps=6)  # fmt: skip
    train(config)
    lines = metrics(tmp_path / "run", "train")
    seen = [int(n) for n in seen_before(torch.arange(0, 28, 4).numpy(), [Fraction(1, 10)])[1]]
    assert ["loss_replay" in line for line in lines] == [b > a for a, b in pairwise(seen)]
    assert all("loss_domain" in line and not any("masked tokens" in key for key in line) for line in lines)


def test_the_report_and_the_record_of_a_run_tell_the_sources_apart(toy, general, tmp_path):
    config = toy.config(tmp_path / "run", replay_file=general[0], replay_share=0.25, max_train_steps=None)
    results = train(dataclasses.replace(config, train=dataclasses.replace(config.train, num_train_epochs=1))).results
    assert 1 <= results["epochs"] < 1 + 6 / 250, "of the domain: the replay takes steps of its own"
    write_report(read_runs([tmp_path / "run"]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for key in ("train_loss_domain", "train_loss_replay", "replay_epochs"):
        assert f'data-key="{key}"' in page
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["data"]["replay"]["documents"] == 60
    assert {"train", "replay", "held_out"} == about["data"].keys()
    train(toy.config(tmp_path / "plain"))
    write_report(read_runs([tmp_path / "plain"]), tmp_path / "page.html")
    assert "<dt>Sources</dt>" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("change", [{"replay_share": 0.2}, {"replay_file": 1}, {"replay_file": None}])
def test_another_replay_is_another_experiment(toy, general, tmp_path, change):
    train(toy.config(tmp_path / "run", replay_file=general[0], checkpointing_steps=5))
    (tmp_path / "run" / "all_results.json").unlink()
    changed = {"replay_file": general[0], **change}
    changed["replay_file"] = general[1] if changed["replay_file"] == 1 else changed["replay_file"]
    with pytest.raises(UserError, match="another experiment, with replay"):
        train(toy.config(tmp_path / "run", resume_from_checkpoint="latest", **changed))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_several_files_are_one_text(toy, tmp_path, split):
    """Of several kinds too; and what is held out is what would be of one file with all of it."""
    lines = toy.train_file.read_text().splitlines()
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]
    Path(files[0]).write_text("\n".join(lines[:150]))
    Path(files[1]).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[150:300]))
    pq.write_table(pa.table({"text": pa.array(lines[300:], pa.large_string())}), files[2])
    tokenizer = load_tokenizer(str(toy.checkpoint))
    given = (tokenizer, tokenizer_info(tokenizer), toy.config().token_store)
    several, one = ({f"{split}_file": f} for f in (tuple(files), str(toy.train_file)))
    found, expected = prepare(CorpusConfig(**several), *given), prepare(CorpusConfig(**one), *given)
    assert found.keys() == expected.keys()
    for name, store in found.items():
        assert store.header["corpus"] == expected[name].header["corpus"]
        assert store.ids.tolist() == expected[name].ids.tolist()
    other = prepare(CorpusConfig(**{f"{split}_file": tuple(files[:2])}), *given)
    assert other[split].header["documents"] < found[split].header["documents"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--train_file", "{toy}", "{bad}/none.txt"], "--train_file {bad}/none.txt: no such file"),
        (["--replay_file", "{bad}/none.txt"], "--replay_file {bad}/none.txt: no such file"),
        (["--replay_file", "{toy}", "--replay_share", "1"], "--replay_share 1.0: more than 0 each, and less than 1"),
        (["--replay_file", "{toy}", "--replay_share", "0.1", "0.1"], "2 shares of 1 files; give one, or one for each"),
        (["--replay_file", "{bad}/columns.csv"], "has no column 'text', only title: name it with --replay_text"),
        (["--replay_file", "{bad}/short.txt"], "the replay split has 5 tokens, less than one chunk of 16"),
    ],
)
def test_a_mistake_in_a_source_is_said_in_a_line(toy, tmp_path, flags, reason):
    (tmp_path / "columns.csv").write_text("title\na\n")
    (tmp_path / "short.txt").write_text("the old cat\n")
    names = {"toy": toy.train_file, "bad": tmp_path}
    argv = [*toy.flags(tmp_path / "run"), *(flag.format(**names) for flag in flags)]
    with pytest.raises(UserError) as raised:
        load_script("train").main(argv)
    assert reason.format(**names) in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_preparing_lists_the_sources_and_the_epochs_that_the_run_sees(toy, general, capsys):
    found = load_script("prepare").main(
        [*toy.flags("none"), "--replay_file", *general, "--replay_share", "0.1", "0.25"]
    )
    printed = capsys.readouterr().out
    assert "takes 12 steps of 8 chunks" in printed
    assert found.keys() == {"token_store", "train", "validation", "replay_1", "replay_2", "outlook"}
    chunks = {"train": 96 - 24 - 9, "replay_1": 9, "replay_2": 24}
    for name, seen in chunks.items():
        assert found[name]["epochs"] == round(seen / found[name]["chunks"], 3)
        assert f"\n{name}\n" in printed
    assert found["replay_1"]["documents"] == 60
    assert "epochs" not in found["validation"]


def test_a_loss_that_is_not_finite_names_the_replay(toy, general, tmp_path):
    text = Path(general[0]).read_text().splitlines()
    text[40] = "a zebra ~ is not of this world ."
    (tmp_path / "replay.txt").write_text("\n".join(text))
    config = toy.config(tmp_path / "run", max_train_steps=60, eval_on_start=False, eval_steps=1000,
                        replay_file=str(tmp_path / "replay.txt"), replay_share=0.3)  # fmt: skip
    with pytest.raises(UserError, match=r"of the replay split, from document .*40"):
        train(dataclasses.replace(config, model=poisoned(toy, tmp_path / "poisoned", "~")))
    [end] = metrics(tmp_path / "run", "end")
    assert end["split"] == "replay"
    assert 40 in end["documents"]
