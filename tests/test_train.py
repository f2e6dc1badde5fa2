"""The loop: exact steps, a schedule that keeps its word, an ordinary checkpoint (invariants 2, 3, 9, 10)."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from transformers import AutoModelForMaskedLM, get_scheduler

from mlm.data.batches import Batches
from mlm.data.chunks import ChunkConfig, cut_into_chunks
from mlm.data.masking import MaskingConfig, make_recipe
from mlm.data.token_store import prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.engine.checkpoint import CheckpointConfig
from mlm.engine.optimizer import OptimizerConfig, Schedule, make_optimizer
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvaluateConfig
from mlm.model.load import ModelConfig
from mlm.report.run_directory import RunConfig
from mlm.train import select, train
from tests.runs import ONE, TORCHRUN, TWO, assert_same_bits, assert_same_weights, half_precision, metrics, run, weights


def slow_training(config):
    """The stock model with its dense head, the whole global batch at once, nothing of Accelerate."""
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    info = tokenizer_info(tokenizer)
    store = prepare(config.corpus, tokenizer, info, config.token_store)["train"]
    chunks = cut_into_chunks(store, config.chunks, config.chunks.max_seq_length, info)
    G = config.update.train_batch_size
    chosen, rate = partial(select, masking=config.masking), lambda step: config.masking.mlm_probability
    batches = Batches(chunks, make_recipe(info), info.maskable, chosen, rate, config.train.seed, G)
    model = AutoModelForMaskedLM.from_pretrained(
        config.model.model_name_or_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.optimizer.learning_rate, weight_decay=0.0)
    warmup, steps = config.optimizer.num_warmup_steps, config.train.max_train_steps
    scheduler = get_scheduler("linear", optimizer, warmup, steps)
    for step in range(steps):
        [batch], _ = batches.load(step, G)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)  # [B * T, V]
        labels = torch.full((len(logits),), -100)
        labels[batch.positions] = batch.targets
        F.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.update.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


@pytest.mark.parametrize("micro_batch", [8, 3, 1])
def test_the_weights_are_those_of_the_slow_loop_however_the_batch_is_cut(toy, tmp_path, micro_batch):
    """Micro-batches hold different counts of masked tokens: a mean of their means would not do."""
    config = toy.config(tmp_path / "run", per_device_train_batch_size=micro_batch, num_warmup_steps=3)
    assert_same_weights(train(config).model.state_dict(), slow_training(config).state_dict())


def test_gradient_accumulation_means_what_it_says(toy, tmp_path):
    whole = train(toy.config(tmp_path / "a"))
    cut = train(
        toy.config(tmp_path / "b", train_batch_size=None, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    )
    assert_same_weights(whole.model.state_dict(), cut.model.state_dict())


@pytest.mark.slow
def test_two_processes_end_with_the_weights_and_the_perplexity_of_one(toy, tmp_path):
    """11 chunks a step over two processes: six and five, in micro-batches of four."""
    flags = {"train_batch_size": 11, "per_device_train_batch_size": 4, "eval_steps": 6}
    one = train(toy.config(tmp_path / "one", **flags))
    status, output, errors = run(TORCHRUN, toy.flags(tmp_path / "two", **flags))
    assert status == 0, errors
    lines = output.splitlines()
    assert len(lines) == len(set(lines)), "only the main process prints"
    two = weights(tmp_path / "two")
    assert_same_weights(one.model.state_dict(), two)
    found = json.loads(lines[-1])
    assert found["perplexity"] == pytest.approx(one.results["perplexity"], rel=1e-5)
    assert found["perplexity_before"] == pytest.approx(one.results["perplexity_before"], rel=1e-6)
    assert found["train_loss"] == pytest.approx(one.results["train_loss"], rel=1e-5)
    for event in ("train", "eval", "end"):
        steps = [line["step"] for line in metrics(tmp_path / "two", event)]
        assert len(steps) == len(set(steps)), "only the main process writes"


@pytest.mark.slow
def test_a_process_with_an_empty_share_takes_part(toy, tmp_path):
    one = train(toy.config(tmp_path / "one", train_batch_size=1, max_train_steps=3))
    flags = toy.flags(tmp_path / "two", train_batch_size=1, max_train_steps=3)
    status, _, errors = run(TWO, flags)
    assert status == 0, errors
    # One chunk has many a gradient next to nothing, whose rounding Adam turns into steps.
    assert_same_weights(one.model.state_dict(), weights(tmp_path / "two"), atol=5e-4)


@pytest.mark.parametrize(("warmup", "steps", "micro_batch"), [(0, 12, 8), (4, 12, 2), (0, 1, 8), (3, 7, 3)])
def test_the_linear_schedule_ends_at_exactly_zero(toy, tmp_path, warmup, steps, micro_batch):
    config = toy.config(tmp_path / "run", num_warmup_steps=warmup, max_train_steps=steps,
                        per_device_train_batch_size=micro_batch, eval_steps=100)  # fmt: skip
    train(dataclasses.replace(config, run=RunConfig(str(tmp_path / "run"), logging_steps=1)))
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run", "train")]
    peak = config.optimizer.learning_rate
    expected = [peak * min((s / warmup) if warmup else 1, (steps - s) / (steps - warmup)) for s in range(1, steps + 1)]
    assert rates == pytest.approx(expected)
    assert rates[-1] == 0.0


def test_a_step_that_the_scaler_skips_is_taken_again_and_moves_nothing(toy, tmp_path):
    config = dataclasses.replace(toy.config(), run=RunConfig(str(tmp_path / "calm"), logging_steps=1))
    calm = train(config, half_precision(2.0**10))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = dataclasses.replace(config, run=RunConfig(str(tmp_path / "stormy"), logging_steps=1))
    stormy = train(config, half_precision(2.0**40))

    assert calm.results["skipped_steps"] == 0
    assert stormy.results["skipped_steps"] > 5
    assert stormy.results["steps"] == 12
    rates = [[line["learning_rate"] for line in metrics(tmp_path / run, "train")] for run in ("calm", "stormy")]
    assert rates[0] == rates[1]
    losses = [[line["loss"] for line in metrics(tmp_path / run, "train")] for run in ("calm", "stormy")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)  # those of other batches differ by far more


def test_training_learns_what_stands_beside_a_word(toy, tmp_path):
    result = train(toy.config(tmp_path / "run", max_train_steps=600, eval_steps=600))
    assert result.results["perplexity_before"] > 100  # about the vocabulary's size
    assert result.results["perplexity"] < 4


def test_a_run_repeats_to_the_bit(toy, tmp_path):
    runs = [train(toy.config(tmp_path / name, dropout=0.1)) for name in "ab"]
    for a, b in zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_run_leaves_the_records_of_the_design(toy, tmp_path):
    checkpoints = CheckpointConfig(checkpointing_steps=5)
    result = train(dataclasses.replace(toy.config(tmp_path / "run", eval_steps=6), checkpoint=checkpoints))
    folder = tmp_path / "run"
    assert json.loads((folder / "all_results.json").read_text()) == result.results
    assert {"perplexity", "perplexity_before", "eval_loss", "train_loss", "tokens_per_second"} <= result.results.keys()
    assert [line["step"] for line in metrics(folder, "eval")] == [0, 6, 12]
    assert [line["step"] for line in metrics(folder, "checkpoint")] == [5, 10]
    assert [line["step"] for line in metrics(folder, "end")] == [12]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_10", "step_5"]
    run = json.loads((folder / "run.json").read_text())
    assert run["configuration"]["optimizer"]["learning_rate"] == 5e-3
    assert {"train corpus", "tokenizer", "masks"} <= run["experiment"].keys()
    assert run["environment"]["torch"] == version("torch")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"{result.results['perplexity']:.4g}" in card


def test_the_first_evaluation_can_be_left_out(toy, tmp_path):
    result = train(toy.config(tmp_path / "run", eval_on_start=False))
    assert "perplexity_before" not in result.results
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [12]


def test_evaluation_follows_the_epochs(toy, tmp_path):
    """n chunks in batches of 8: an epoch ends with the step that reaches its last chunk."""
    config = toy.config(tmp_path / "run", max_train_steps=None, num_train_epochs=2, max_train_samples=20)
    assert train(config).results["steps"] == 5  # ceil(2 * 20 / 8)
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [0, 3, 5]


def test_the_best_weights_are_kept_where_asked(toy, tmp_path):
    """A learning rate that ruins the model: the best evaluation is not the last."""
    loop = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "eval_steps": 1, "max_train_steps": 3}
    with pytest.raises(UserError, match="nothing was learnt"):
        train(toy.config(tmp_path / "last", **loop))
    last = json.loads((tmp_path / "last" / "all_results.json").read_text())
    best = train(toy.config(tmp_path / "best", load_best_model_at_end=True, **loop))
    losses = [line["eval_loss"] for line in metrics(tmp_path / "best", "eval")]
    assert last["eval_loss"] == losses[-1] > min(losses) == best.results["eval_loss"]
    untouched = weights(toy.checkpoint)
    assert losses.index(min(losses)) == 0
    assert_same_bits(weights(tmp_path / "best"), untouched)


def test_whole_words_train_too(toy, tmp_path):
    config = dataclasses.replace(toy.config(tmp_path / "run"), masking=MaskingConfig(whole_word_mask=True))
    assert train(config).results["perplexity"] < 200


def test_a_batch_with_nothing_masked_gives_zero_loss_and_no_nan(toy, tmp_path):
    """Some of the steps: batches of one chunk of 16 tokens."""
    few = {"mlm_probability": 0.02, "train_batch_size": 1, "logging_steps": 1}
    result = train(toy.config(tmp_path / "run", **few))
    losses = [line["loss"] for line in metrics(tmp_path / "run", "train")]
    assert 0 < losses.count(0.0) < len(losses) == 12
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mlm_probability": 0.0}, "--mlm_probability 0 predicts no token"),
        ({"eval_mlm_probability": 0.0}, "no token in 37 chunks is masked, .* more than --eval_mlm_probability 0"),
        ({"eval_mlm_probability": 1e-6}, "no token in 37 chunks is masked"),
    ],
)
def test_a_run_that_could_learn_or_measure_nothing_is_refused(toy, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        train(toy.config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mlm_probability": 1e-7}, "no token was masked in any step"),
        (
            {"learning_rate": 1.0, "lr_scheduler_type": "constant"},
            "frequencies alone reach .*: training has destroyed the model, give a lower --learning_rate",
        ),
        (
            {"learning_rate": 1.0, "lr_scheduler_type": "constant", "eval_on_start": False},
            "perplexity [0-9.e+]* after, where token frequencies alone reach .*: training has destroyed the model",
        ),
    ],
)
def test_a_run_that_has_learnt_nothing_ends_in_an_error(toy, tmp_path, settings, words):
    """After its figures are written, so that one can see what happened; and again where it is started again."""
    for again in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(UserError, match=f"^nothing was learnt: .*{words}"):
            train(toy.config(tmp_path / "run", **settings, **again))
    assert (tmp_path / "run" / "all_results.json").exists()
    assert metrics(tmp_path / "run", "end")


def test_a_model_from_scratch_far_beyond_token_frequencies_is_a_loud_line(toy, tmp_path, capsys):
    model = ModelConfig(config_name=str(toy.checkpoint), tokenizer_name=str(toy.checkpoint))
    settings = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "eval_on_start": False}
    assert train(toy.config(tmp_path / "run", modules={"model": model}, **settings)).results["steps"] == 12
    assert "warning: nothing was learnt: held-out perplexity " in capsys.readouterr().out


def test_a_model_no_better_than_token_frequencies_is_a_loud_line_where_nothing_was_measured_before(
    toy, tmp_path, capsys
):
    said = "^warning: the model does hardly better than token frequencies alone; scripts/evaluate.py .* --compare "
    for steps, before, loud in ((2, False, True), (2, True, False), (60, False, False)):
        folder = tmp_path / f"{steps} {before}"
        result = train(toy.config(folder, max_train_steps=steps, eval_on_start=before)).results
        assert (result["perplexity"] > result["perplexity_unigram"]) == (steps == 2)
        assert bool(re.search(f"{said}{toy.checkpoint} ", capsys.readouterr().out, re.M)) == loud


def test_line_by_line_says_which_share_of_the_text_it_leaves_out(toy, tmp_path, caplog):
    """Documents of 10 tokens in rows of 8; where all fit there is nothing to say."""
    with caplog.at_level("WARNING", "mlm"):
        train(toy.config(tmp_path / "whole", line_by_line=True, max_train_steps=1))
        assert "--line_by_line" not in caplog.text
        train(toy.config(tmp_path / "cut", line_by_line=True, max_seq_length=8, max_train_steps=1))
    said = [message for message in caplog.messages if "--line_by_line" in message]
    for split in ("train", "validation"):
        assert f"--line_by_line leaves out 20% of the tokens of the {split} split, from documents" in "".join(said)


@pytest.mark.slow
def test_a_destroyed_model_is_a_failing_exit_status(toy, tmp_path):
    flags = toy.flags(tmp_path / "run", learning_rate=1.0, lr_scheduler_type="constant")
    status, _, errors = run(ONE, flags)
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: nothing was learnt: held-out perplexity ")


@pytest.mark.parametrize(
    "loop",
    [
        {"num_warmup_steps": 12},
        {"lr_scheduler_type": "polynomial", "num_warmup_steps": 12},
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_the_first_step(toy, tmp_path, loop):
    with pytest.raises(UserError, match=r"--num_warmup_steps 12|--lr_scheduler_type polynomial"):
        train(toy.config(tmp_path / "run", **loop))


def test_no_epochs_is_an_evaluation(toy, tmp_path):
    for schedule in ("linear", "polynomial"):
        config = toy.config(tmp_path / schedule, max_train_steps=None, num_train_epochs=0, lr_scheduler_type=schedule)
        assert train(config).results["steps"] == 0


@pytest.mark.parametrize(
    "chunks", [ChunkConfig(16, remainder="pad"), ChunkConfig(12, line_by_line=True), ChunkConfig(8, line_by_line=True)]
)
def test_padded_chunks_train_as_in_the_slow_loop(toy, tmp_path, chunks):
    config = toy.config(tmp_path / "run", chunks=chunks, per_device_train_batch_size=3)
    assert_same_weights(train(config).model.state_dict(), slow_training(config).state_dict())


def test_bf16_rounds_and_trains_all_the_same(toy, tmp_path):
    losses = []
    for precision in ("no", "bf16"):
        config = toy.config(tmp_path / precision, mixed_precision=precision, max_train_steps=60)
        losses.append(train(config).results["eval_loss"])  # in one process, each in its own precision
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=0.3)


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_runs(toy, tmp_path, name):
    config = toy.config(tmp_path / "run", lr_scheduler_type=name, num_warmup_steps=1, max_train_steps=3)
    assert train(config).results["steps"] == 3


def test_biases_and_norms_do_not_decay():
    """ConvBERT has a bias of two dimensions."""
    layer = torch.nn.Module()
    layer.dense, layer.norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)
    layer.conv = torch.nn.Module()
    layer.conv.bias = torch.nn.Parameter(torch.zeros(2, 1))
    decayed, plain = make_optimizer(layer.named_parameters(), OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"] == [layer.dense.weight]
    assert len(plain["params"]) == 4


def test_adamw_is_as_its_flags_say_and_as_torch_has_it_without_them():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    asked, plain = OptimizerConfig(adam_beta1=0.8, adam_beta2=0.98, adam_epsilon=1e-6), OptimizerConfig()
    own, torch_s = make_optimizer([("w", p)], asked).defaults, torch.optim.AdamW([p]).defaults
    assert (own["betas"], own["eps"]) == ((0.8, 0.98), 1e-6)
    kept = make_optimizer([("w", p)], plain).defaults
    assert (kept["betas"], kept["eps"]) == (torch_s["betas"], torch_s["eps"])


@pytest.mark.parametrize("mistake", [{"adam_beta1": 1.0}, {"adam_beta2": 1.5}, {"adam_beta2": -0.1}])
def test_a_decay_of_adamw_lies_from_zero_to_below_one(mistake):
    with pytest.raises(UserError, match="--adam_beta"):
        OptimizerConfig(**mistake)


def test_gradients_are_clipped_to_the_norm_asked_for_or_not_at_all(toy, tmp_path):
    """Adam forgets a constant factor, but not one that changes from step to step."""
    weights = [
        train(toy.config(tmp_path / str(norm), max_grad_norm=norm)).model.state_dict() for norm in (0, 1e9, 0.01)
    ]
    name = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(weights[0][name], weights[1][name])
    assert not torch.allclose(weights[0][name], weights[2][name], atol=1e-4)


def test_fewer_chunks_can_be_evaluated(toy, tmp_path):
    modules = {"evaluate": EvaluateConfig(max_eval_samples=5)}
    few = train(toy.config(tmp_path / "few", max_train_steps=1, modules=modules))
    assert 0 < few.results["eval_masked_tokens"] <= 5 * 16


def test_a_loss_scale_that_has_collapsed_stops_the_run(toy, tmp_path):
    broken = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    torch.nn.init.constant_(broken.cls.predictions.bias, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(toy.checkpoint)).save_pretrained(tmp_path / "broken")
    modules = {"model": ModelConfig(model_name_or_path=str(tmp_path / "broken"))}
    with pytest.raises(UserError, match="step 1: the loss or its gradients overflow at any fp16 loss scale"):
        train(toy.config(tmp_path / "run", modules=modules), half_precision(2.0**16))


@pytest.mark.slow
def test_a_process_with_an_empty_share_takes_part_under_fp16_too(toy, tmp_path):
    program = f"""
import torch
from accelerate import Accelerator
from mlm import cli
from mlm.config import Config
from mlm.train import select, train
accelerator = Accelerator(cpu=True)
accelerator.state._mixed_precision = "fp16"
accelerator.native_amp = True
accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
flags = {toy.flags(tmp_path / "run", train_batch_size=1, max_train_steps=3)!r}
train(cli.parse_config(Config, flags), accelerator)
"""
    (tmp_path / "program.py").write_text(program)
    status, _, errors = run(TWO, [], str(tmp_path / "program.py"))
    assert status == 0, errors
    assert metrics(tmp_path / "run", "end")[0]["steps"] == 3


@pytest.mark.slow
def test_the_output_loads_where_this_project_is_not_installed(toy, tmp_path):
    """Stock from_pretrained and pipeline, in a process that cannot import mlm."""
    train(toy.config(tmp_path / "run"))
    script = """
import sys
sys.modules["mlm"] = None
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
AutoModelForMaskedLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1])
print(pipeline("fill-mask", sys.argv[1])("the old [MASK] likes milk every day .")[0]["score"])
"""
    stock = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], cwd=tmp_path, capture_output=True, text=True
    )
    assert stock.returncode == 0, stock.stderr
    assert 0 < float(stock.stdout) <= 1


def test_fp16_on_a_cpu_is_refused_and_bf16_offered(toy, tmp_path):
    with pytest.raises(UserError, match=r"fp16.*bf16"):
        train(toy.config(tmp_path / "run", mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()
    PartialState._reset_state()
