"""scripts/sweep.py: settings are halved by honest comparisons, a stopped sweep goes on, its command is the best's."""

import contextlib
import io
import json
import math
import shlex
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from mlm import cli
from mlm.config import Config
from mlm.data.tokenizer import load_tokenizer
from mlm.errors import UserError
from mlm.train import train
from tests.conftest import REPOSITORY
from tests.runs import ONE, TWO, finish, half_precision, metrics, run, start, steps_taken, wait_for
from tests.scripts import load_script
from tests.tokenizers_for_tests import wordpiece

script = load_script("sweep")
SWEEP = str(REPOSITORY / "scripts" / "sweep.py")


def flags(toy, output, *settings, **more):
    return [*toy.flags(output, **{"logging_steps": 1, **more}), *(["--sweep", *settings] if settings else [])]


def sweep(toy, output, *settings, **more):
    """What it prints, and its sweep.json."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(UserError):
        script.main(flags(toy, output, *settings, **more))
    return printed.getvalue(), json.loads((output / "sweep.json").read_text())


def order(found):
    return [(row["rung"], row["setting"]) for row in found["runs"]]


def test_of_ten_settings_four_go_on_to_three_times_the_steps_and_two_to_all():
    assert script.plan(10, factor=3) == [(10, 9), (4, 3), (2, 1)]
    assert script.plan(8, factor=2) == [(8, 4), (4, 2), (2, 1)]
    assert script.plan(2, factor=3) == [(2, 1)]
    # 10 / 9 + 4 / 3 + 2
    assert "4.444 times the steps of one run, 16 times its evaluations" in script.cost(script.plan(10, factor=3))


@given(st.integers(2, 10_000), st.integers(2, 5))
def test_two_settings_take_all_steps_and_no_more_steps_are_taken_than_without_halving(settings, factor):
    counts, divisors = zip(*script.plan(settings, factor), strict=True)
    assert counts[0] == settings
    assert (counts[-1], divisors[-1]) == (2, 1)
    for before, after in pairwise(counts):
        assert after == max(2, math.ceil(before / factor)) < before
    assert all(longer * factor == shorter for shorter, longer in pairwise(divisors))
    if factor >= 3:
        assert sum(count / divisor for count, divisor in script.plan(settings, factor)) <= settings


LATEST = {"resume_from_checkpoint": "latest"}
OBVIOUS = "learning_rate=0,5e-3,100,1e30"


@pytest.fixture(scope="module")
def obvious(toy, tmp_path_factory):
    """One setting learns, one does not, one destroys the model, one makes a loss that is not finite."""
    output = tmp_path_factory.mktemp("obvious") / "sweep"
    return output, *sweep(toy, output, OBVIOUS, num_warmup_steps=6)


def test_the_setting_that_learns_is_the_best_and_those_that_break_the_model_are_lost(obvious):
    _, printed, found = obvious
    assert order(found) == [
        *((1, f"learning_rate={value}") for value in ("5e-3", "0", "100", "1e30")),
        *((2, f"learning_rate={value}") for value in ("5e-3", "0")),
    ]
    assert [row["lost"] for row in found["runs"]] == [False, False, True, True, False, False]
    assert found["best"]["setting"] == "learning_rate=5e-3"
    table = printed[printed.index("rung  setting") :].splitlines()[1:7]
    assert [line.split()[-1] for line in (table[0], *table[2:5])] == ["best", "lost", "lost", "best"]
    assert "learning_rate=1e30: step 3: the loss or its gradient is not finite" in printed
    assert "learning_rate=100: nothing was learnt" in printed


def test_each_run_is_a_whole_one_of_its_length_with_a_warm_up_in_proportion(obvious):
    output, _, found = obvious
    for row in found["runs"]:
        steps, warmup = {1: (4, 2), 2: (12, 6)}[row["rung"]]
        configuration = json.loads((Path(row["output_dir"]) / "run.json").read_text())["configuration"]
        assert configuration["optimizer"]["num_warmup_steps"] == warmup
        assert configuration["train"]["max_train_steps"] == steps
    for number, steps in ((1, 4), (2, 12)):
        lines = metrics(output / f"rung_{number}" / "learning_rate=5e-3", "train")
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        rates = [line["learning_rate"] for line in lines]
        assert (max(rates), rates[-1]) == (5e-3, 0)


def test_epochs_are_divided_as_steps_are(toy):
    config = toy.config(None, max_train_steps=None, num_train_epochs=3.0)
    short = script.shortened(config, 9, Path("run"))
    assert short.train.steps(800, 8) == 34  # of 300
    assert (short.train.max_train_steps, short.train.num_train_epochs) == (None, 1 / 3)


def test_a_difference_is_the_one_that_a_run_reports_to_the_model_it_began_with(obvious):
    """The setting that learns nothing is that model."""
    _, printed, found = obvious
    *_, best, untrained = found["runs"]
    reported = json.loads((Path(best["output_dir"]) / "comparison.json").read_text())["held_out"]["difference"]
    assert untrained["difference"]["value"] == pytest.approx(-reported["value"])
    assert untrained["difference"]["interval"] == pytest.approx([-end for end in reversed(reported["interval"])])
    assert best["difference"] is None
    assert not untrained["within_noise"]
    low, high = untrained["difference"]["interval"]
    assert f"{untrained['difference']['value']:+.4f} ({low:+.4f} to {high:+.4f})" in printed


def test_what_more_steps_were_worth_is_said_of_the_best(obvious):
    _, printed, found = obvious
    losses = [row["eval_loss"] for row in found["runs"] if row["setting"] == "learning_rate=5e-3"]
    [worth] = found["more_steps"]
    assert worth["value"] == pytest.approx(losses[1] - losses[0])
    first, last = (f"{math.exp(loss):.4g}" for loss in losses)
    assert f"perplexity {first} after 4 steps; perplexity {last} after 12 steps, {worth['value']:+.4f}" in printed


def test_only_the_best_keeps_its_weights_and_it_is_an_ordinary_checkpoint(obvious):
    output, _, found = obvious
    best = Path(found["best"]["output_dir"])
    assert [path.parent for path in output.rglob("*.safetensors")] == [best]
    AutoModelForMaskedLM.from_pretrained(best)


def test_the_page_shows_the_last_settings_and_every_length_of_the_best(obvious):
    output, _, _ = obvious
    page = (output / "report.html").read_text()
    for run_name in ("rung_2/learning_rate=5e-3", "rung_1/learning_rate=5e-3", "rung_2/learning_rate=0"):
        assert f'data-run="{run_name}"' in page
    assert 'data-run="rung_1/learning_rate=0"' not in page


def test_the_command_is_that_of_the_best_setting_at_full_length(toy, obvious):
    output, printed, found = obvious
    command = printed.splitlines()[-1]
    assert command == found["best"]["command"]
    program, *words = shlex.split(command)[1:]
    assert Path(program).name == "train.py"
    others = flags(toy, output / "best", num_warmup_steps=6, learning_rate=5e-3)
    assert cli.parse_config(Config, words) == cli.parse_config(Config, others)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_file": ("a b.txt", "$c.txt"), "replay_file": ("d", "e"), "replay_share": (0.1, 0.2)},
        {"validation_file": "-x", "seed": -1, "allow_leaks": True, "eval_on_start": False},
        {"dropout": 0.0, "eval_steps": 7, "per_device_train_batch_size": "auto", "train_batch_size": 64},
        {"learning_rate": 1e-7, "checkpointing_steps": "epoch", "overwrite_output_dir": True, "max_grad_norm": 0.0},
    ],
)
def test_flags_are_read_as_the_run_that_they_were_made_of(settings):
    asked = Config.of(**{**settings, "overwrite_output_dir": False}, output_dir="out")
    line = shlex.join(script.flags(Config.of(**settings, resume_from_checkpoint="latest"), "out"))
    assert cli.parse_config(Config, shlex.split(line)) == asked


def test_the_best_command_takes_the_sweep_s_batch_on_any_number_of_processes():
    asked = script.with_batch(Config.of(per_device_train_batch_size=4, gradient_accumulation_steps=2), processes=3)
    again = cli.parse_config(Config, script.flags(asked, "out")).update
    assert again.global_batch(1) == again.global_batch(8) == 24
    assert again.per_device_train_batch_size == 4


def test_settings_that_differ_by_less_than_noise_are_marked(toy, tmp_path):
    _, found = sweep(toy, tmp_path / "sweep", "mask_replace_prob=0.8,0.75", max_train_steps=3)
    best, other = found["runs"]
    assert (best["within_noise"], other["within_noise"]) == (None, True)
    low, high = other["difference"]["interval"]
    assert low <= 0 <= other["difference"]["value"] <= high


def test_a_best_value_at_an_end_of_those_tried_is_named():
    values = script.grid(["learning_rate=1e-4,1e-3,2e-4", "mlm_probability=0.15,0.3", "dropout=none,0,0.1"])
    for best, words in (
        ("1e-4", "minimum of those tried: try smaller"),
        ("1e-3", "maximum of those tried: try larger"),
    ):
        [line] = script.at_an_end(values, f"learning_rate={best} mlm_probability=0.3 dropout=0")
        assert line == f"learning_rate={best} is the {words} ones too"
    assert script.at_an_end(values, "learning_rate=2e-4 mlm_probability=0.3 dropout=0") == []


TEXTS = {"a": "sweep:\n- learning_rate=1e-3,2e-3\n- dropout=0,0.1", "b": "dropout: 0", "c": "dropout: none"}


def test_a_file_of_flags_may_name_what_is_swept_and_a_recipe_may_be_swept(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    asked = cli.parse_config(script.RunsConfig, [f"--config={tmp_path}/a"]).sweep.sweep
    assert list(script.grid(asked)) == ["learning_rate", "dropout"]
    found = [script.configure([], [f"config={tmp_path}/{name}"]) for name in "bc"]
    assert [config.model.dropout for config in found] == [0, None]


def test_a_sweep_of_settings_that_all_break_the_model_says_so(toy, tmp_path):
    with pytest.raises(UserError, match="no setting is left"):
        script.main(flags(toy, tmp_path / "sweep", "learning_rate=1e30,1e31", max_train_steps=3))
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert found["best"] is None
    assert [row["lost"] for row in found["runs"]] == [True, True]


def test_a_loss_scale_that_collapses_is_a_setting_that_is_lost(toy, tmp_path, monkeypatch):
    """Under fp16, here on the CPU, by a real scaler."""
    broken = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    torch.nn.init.constant_(broken.cls.predictions.bias, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(toy.checkpoint)).save_pretrained(tmp_path / "broken")
    monkeypatch.setattr(script, "train", lambda config: train(config, half_precision(2.0**16)))
    models = f"model_name_or_path={toy.checkpoint},{tmp_path / 'broken'}"
    printed, found = sweep(toy, tmp_path / "sweep", models, max_train_steps=3)
    assert [row["lost"] for row in found["runs"]] == [False, True]
    assert "overflow at any fp16 loss scale" in printed


def test_models_with_other_tokenizers_do_not_compare(toy, tmp_path):
    other = tmp_path / "other"
    tokenizer = wordpiece(toy.train_file.read_text().splitlines(), 90)
    tokenizer.save_pretrained(other)
    toy.new_model(tokenizer).save_pretrained(other)
    models = f"model_name_or_path={toy.checkpoint},{other}"
    with pytest.raises(UserError, match=r"do not compare: These runs were measured on different .*tokenizers"):
        script.main(flags(toy, tmp_path / "sweep", models, max_train_steps=1))


def test_a_run_that_fails_for_another_reason_ends_the_sweep_and_names_the_setting(toy, tmp_path):
    with pytest.raises(UserError, match=r"^model_name_or_path=nowhere: cannot load the"):
        script.main(flags(toy, tmp_path / "sweep", f"model_name_or_path={toy.checkpoint},nowhere", max_train_steps=1))


MISTAKES = {
    "nothing to sweep": ([], {}, "give two different settings or more"),
    "one setting": (["learning_rate=1"], {}, "give two different settings or more"),
    "one setting twice": (["learning_rate=1e-3,0.001"], {}, "give two different settings or more"),
    "no values": (["learning_rate"], {}, "--sweep learning_rate: give FLAG=VALUE,VALUE"),
    "a flag twice": (["dropout=0,1", "dropout=0.1"], {}, "--sweep dropout=0.1: give FLAG=VALUE,VALUE, each flag once"),
    "an unknown flag": (["lerning_rate=1,2"], {}, "unknown flag --lerning_rate; did you mean --learning_rate?"),
    "no number": (["learning_rate=1e-3,fast"], {}, "--learning_rate: 'fast' is not FLOAT"),
    "a value that cannot be": (["dropout=0,2"], {}, "--dropout 2.0 is no dropout probability"),
    "seeds": (["seed=1,2"], {}, "--sweep seed: a lucky seed is no better setting"),
    "lengths": (["max_train_steps=10,20"], {}, "--sweep max_train_steps: the sweep sets the steps"),
    "folders": (["output_dir=a,b"], {}, "--sweep output_dir: each run of a sweep has a folder of its own"),
    "chunk lengths": (["max_seq_length=8,16"], {}, "leave out flags of chunks and evaluation"),
    "mask seeds": (["eval_mask_seed=0,1"], {}, "leave out flags of chunks and evaluation"),
    "no evaluation before": (["dropout=0,0.1"], {"eval_on_start": False}, "--eval_on_start false: leave it out"),
    "a checkpoint": (["dropout=0,0.1"], {"resume_from_checkpoint": "a"}, "a sweep goes on with `latest` only"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(toy, tmp_path, mistake):
    settings, more, words = MISTAKES[mistake]
    with pytest.raises(UserError) as told:
        script.main(flags(toy, tmp_path / "sweep", *settings, **more))
    assert words in str(told.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("line", ["seed: 7", "max_train_steps: 99", "overwrite_output_dir: true"])
def test_files_of_flags_do_not_bring_in_what_cannot_be_swept(toy, tmp_path, line):
    (tmp_path / "a.yaml").write_text("dropout: 0.1")
    (tmp_path / "b.yaml").write_text(line)
    files = f"config={tmp_path}/a.yaml,{tmp_path}/b.yaml"
    asked = [word for word in flags(toy, tmp_path / "sweep", files) if not word.startswith("--max_train_steps")]
    with pytest.raises(UserError, match="the files have to agree on the seed, the length and the folder"):
        script.main(asked)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_needs_a_folder_without_a_run_and_is_not_begun_twice(toy, obvious):
    output, _, found = obvious
    nowhere = [word for word in flags(toy, output, "dropout=0,0.1") if not word.startswith("--output_dir")]
    for argv, words in (
        (nowhere, "give --output_dir"),
        (flags(toy, found["best"]["output_dir"], "dropout=0,0.1"), "holds a run; name another folder"),
        (flags(toy, output, "dropout=0,0.1"), "holds a sweep; --resume_from_checkpoint latest goes on with it"),
        (flags(toy, output, "learning_rate=0,5e-3", num_warmup_steps=6, **LATEST), "values of max_train_steps"),
        (
            flags(toy, output, OBVIOUS, num_warmup_steps=6, weight_decay=0.1, **LATEST),
            "values of weight_decay; a sweep",
        ),
    ):
        with pytest.raises(UserError, match=words):
            script.main(argv)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_without_repeating_what_has_ended(toy, tmp_path):
    more = {"max_train_steps": 150, "eval_steps": 100_000, "checkpointing_steps": 50}
    output = tmp_path / "sweep"
    argv = flags(toy, output, "learning_rate=1e-3,5e-3,1e30", **more)
    last = output / "rung_2" / "learning_rate=5e-3"
    process = start(ONE, argv, SWEEP)
    wait_for(lambda: steps_taken(last) >= 20, process)
    process.terminate()
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM
    again = "the same command with --resume_from_checkpoint latest goes on"
    assert errors == f"stopped by SIGTERM in the run of learning_rate=5e-3; {again}\n"
    ended = {path: path.stat().st_mtime_ns for path in output.glob("rung_1/*/run.json")}
    assert len(ended) == 3
    status, printed, errors = run(ONE, [*argv, "--resume_from_checkpoint=latest"], SWEEP)
    assert status == 0, errors
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    assert [line["step"] > 0 for line in metrics(last, "start")] == [False, True]
    found = json.loads((output / "sweep.json").read_text())
    best, other, lost = (f"learning_rate={value}" for value in ("5e-3", "1e-3", "1e30"))
    assert order(found) == [(1, best), (1, other), (1, lost), (2, best), (2, other)]
    summary = json.loads(printed.splitlines()[-1])
    assert {name: summary[name] for name in found["best"]} == found["best"]


@pytest.mark.slow
def test_two_processes_choose_what_one_chooses(toy, tmp_path, obvious):
    """Also the batch of its command, for one process, where theirs followed from how many they were."""
    _, _, expected = obvious
    batch = {"train_batch_size": "none", "per_device_train_batch_size": 4}
    status, _, errors = run(TWO, flags(toy, tmp_path / "sweep", OBVIOUS, num_warmup_steps=6, **batch), SWEEP)
    assert status == 0, errors
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert order(found) == order(expected)
    for row, own in zip(found["runs"], expected["runs"], strict=True):
        assert row["lost"] == own["lost"]
        if not row["lost"]:
            assert row["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-3)
    commands = [shlex.split(of["best"]["command"])[2:] for of in (found, expected)]
    assert [cli.parse_config(Config, words).update.global_batch(1) for words in commands] == [8, 8]
