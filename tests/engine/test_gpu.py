"""What a GPU changes, and what it must not: each invariant again where kernels, precision and memory are a GPU's."""

import json
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, get_scheduler

from benchmarks.made_up import FIRST_WORD, dense_objective, random_words
from mlm.data.chunks import ChunkConfig
from mlm.data.masking import Recipe, corrupt, draw, draw_torch, select_tokens, select_words, select_words_torch
from mlm.data.token_store import prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.engine.update import Update, UpdateConfig
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvaluateConfig, make_eval_set
from mlm.evaluation.evaluate import evaluate
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import objective, train
from tests.runs import (
    PYTHON,
    assert_each_step_once,
    assert_same_bits,
    assert_same_weights,
    finish,
    metrics,
    run,
    start,
    steps_taken,
    wait_for,
    weights,
)

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")
PRECISIONS = ["no", "bf16", "fp16"]
ROUNDING = {"no": 1e-4, "bf16": 2e-2, "fp16": 5e-3}  # of a loss and, in norm, of a gradient
STEPS, VOCABULARY, LENGTH = 4, 1000, 32
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"],
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
}


def bert(dropout=0.0, vocabulary=VOCABULARY, hidden=64):
    shape = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=vocabulary, **shape, **dropouts))


def on_gpu(precision="no", scale=2.0**10):
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, kwargs_handlers=[GradScalerKwargs(init_scale=scale)])


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def unfused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def make_update(accelerator, optimizer=fused, model=None, batches=None, micro_batch=8, loss=objective):
    batches = batches or random_words(64, LENGTH, VOCABULARY, 8)
    model = SparseMaskedLM((model or bert()).to(accelerator.device), LENGTH).train()
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = get_scheduler("linear", made, 0, STEPS)
    return Update(model, loss, batches, [made], [schedule], accelerator, UpdateConfig(None, micro_batch))


def state(update):
    return {name: tensor.clone() for name, tensor in update.model.model.state_dict().items()}


@pytest.fixture
def little_memory():
    """little_memory(bytes): this process may allocate so much more on the GPU."""

    def limit(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + more) / torch.cuda.get_device_properties(0).total_memory
        )

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, -3])
def test_masks_and_targets_are_the_hosts_to_the_bit(seed):
    numbers = np.random.default_rng(1)
    ids = numbers.integers(0, VOCABULARY, (16, LENGTH))
    word_starts = numbers.random((16, LENGTH)) < 0.6
    chunk_ids = numbers.integers(0, 2**40, 16)
    maskable = np.arange(VOCABULARY) >= FIRST_WORD
    recipe = Recipe(round(0.8 * 2**32), round(0.9 * 2**32), 4, np.flatnonzero(maskable))
    draws = draw(seed, 3, chunk_ids, LENGTH)
    there = draw_torch(seed, 3, torch.from_numpy(chunk_ids).to(GPU), LENGTH)
    assert np.array_equal(there.cpu().numpy().view(np.uint64), draws)
    on_device = [torch.from_numpy(each).to(GPU) for each in (maskable[ids], word_starts, ids)]
    for here, other in (
        (select_tokens(maskable[ids], draws, 0.3), select_tokens(on_device[0], there, 0.3)),
        (
            select_words(maskable[ids], draws, 0.3, word_starts),
            select_words_torch(on_device[0], there, 0.3, on_device[1]),
        ),
    ):
        assert np.array_equal(other.cpu().numpy(), here)
        for mine, its in zip(
            corrupt(ids, here, draws, recipe), corrupt(on_device[2], other, there, recipe), strict=True
        ):
            assert np.array_equal(its.cpu().numpy(), mine)


def first_gradient(precision, micro_batch, loss):
    """The loss in nats a masked token of one step, and the gradient [all parameters] that its optimizer gets."""
    received = []
    update = make_update(on_gpu(precision), partial(torch.optim.SGD, lr=0.0), micro_batch=micro_batch, loss=loss)
    update.optimizers[0].register_step_pre_hook(
        lambda *_: received.append(torch.cat([p.grad.flatten() for p in update.parameters]))
    )
    step = update(0)
    return step.sums[0].item() / step.masked, received[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("micro_batch", "loss"), [(3, objective), (1, objective), (8, dense_objective)])
def test_a_gradient_hangs_neither_on_micro_batches_nor_on_the_sparse_head(precision, micro_batch, loss):
    """Invariants 2 and 8."""
    nats, gradient = first_gradient(precision, 8, objective)
    other_nats, other_gradient = first_gradient(precision, micro_batch, loss)
    assert other_nats == pytest.approx(nats, rel=ROUNDING[precision])
    assert (other_gradient - gradient).norm() <= ROUNDING[precision] * gradient.norm()


@pytest.mark.parametrize("optimizer", [fused, unfused, sgd])
def test_fp16s_overflows_are_taken_again_and_hold_the_schedule(optimizer):
    """Invariant 9, with the GPU's own scaler."""
    calm, stormy = (make_update(on_gpu("fp16", scale), optimizer) for scale in (2.0**8, 2.0**30))
    for step in range(STEPS):
        expected, found = calm(step), stormy(step)
        assert expected.overflows == 0
        assert found.overflows > 0 or step > 0
        torch.testing.assert_close(found.sums, expected.sums, rtol=1e-2, atol=0.0)
        assert stormy.schedulers[0].get_last_lr() == calm.schedulers[0].get_last_lr()
    assert stormy.schedulers[0].get_last_lr() == [0.0]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizer", [fused, unfused])
def test_a_gradient_that_is_not_finite_moves_no_weight(precision, optimizer):
    def poisoned(model, batch):
        return objective(model, batch) * (torch.nan if poison else 1.0)

    update = make_update(on_gpu(precision), optimizer, loss=poisoned)
    poison = False
    assert not update(0).nonfinite
    good, poison = state(update), True
    assert update(1).nonfinite
    assert_same_bits(state(update), good)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_host_never_waits_for_the_device_in_a_step(precision):
    update = make_update(on_gpu(precision), micro_batch=3)
    update(0)  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, STEPS):
            update(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_micro_batch_too_large_for_the_gpu_is_halved_and_the_step_taken_again(little_memory, precision):
    """256 chunks of 32 tokens have 1,229 masked ones, whose logits over 30,000 words are 147 MB, thrice."""
    batches = random_words(512, LENGTH, 30_000, 256)
    plenty, short = (
        make_update(on_gpu(precision), model=bert(vocabulary=30_000), batches=batches, micro_batch="auto")
        for _ in range(2)
    )
    little_memory(2**28)
    found = [short(step).sums.item() for step in range(STEPS)]
    assert 1 <= short.micro_batch < 256
    assert not torch.is_autocast_enabled("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert [plenty(step).sums.item() for step in range(STEPS)] == pytest.approx(found, rel=ROUNDING[precision])
    assert plenty.micro_batch == 256
    if precision == "no":
        assert_same_weights(state(short), state(plenty))


def test_a_state_of_the_optimizer_that_does_not_fit_is_named(little_memory):
    """64 million weights, 256 MB: AdamW's two moments do not fit where gradients and clipping do."""
    model = bert(vocabulary=250_000, hidden=256)
    update = make_update(on_gpu(), unfused, model, random_words(8, LENGTH, VOCABULARY, 1), micro_batch=1)
    little_memory(900 * 2**20)
    with pytest.raises(UserError, match="out of memory for the state of AdamW"):
        update(0)


def test_an_evaluation_is_the_cpus_whatever_its_batches(toy):
    """Invariant 3."""
    config, tokenizer = toy.config(), load_tokenizer(str(toy.checkpoint))
    info = tokenizer_info(tokenizer)
    store = prepare(config.corpus, tokenizer, info, config.token_store)["validation"]

    def measure(accelerator, batch_size):
        settings = EvaluateConfig(per_device_eval_batch_size=batch_size)
        eval_set = make_eval_set("toy", store, ChunkConfig(remainder="pad"), 16, info, settings)
        model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint).to(accelerator.device)
        return evaluate(SparseMaskedLM(model), eval_set, accelerator)

    expected = measure(Accelerator(cpu=True), 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    for batch_size in (1, 7, 64):
        found = measure(on_gpu(), batch_size)
        assert found.same_masks(expected)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_training_on_the_gpu_ends_where_training_on_the_cpu_does(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    here = train(toy.config(tmp_path / "cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    for number in range(2):  # as often as one likes in a process
        there = train(toy.config(tmp_path / f"gpu{number}"))
        assert next(there.model.parameters()).device.type == "cuda"
        assert there.results["perplexity_before"] == pytest.approx(here.results["perplexity_before"], rel=1e-6)
        assert there.results["perplexity"] == pytest.approx(here.results["perplexity"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_a_signal_ends_resumes_bit_for_bit_with_deterministic_kernels(toy, tmp_path, precision):
    """Invariant 4, dropout and all."""
    settings = {"max_train_steps": 300, "dropout": 0.1, "eval_on_start": False, "eval_steps": 10_000}
    settings |= {"mixed_precision": precision, "deterministic": True}
    status, _, errors = run(PYTHON, toy.flags(tmp_path / "whole", **settings))
    assert status == 0, errors
    flags = toy.flags(tmp_path / "run", **settings)
    process = start(PYTHON, flags)
    wait_for(lambda: steps_taken(tmp_path / "run") >= 20, process)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM, errors
    [stopped_at] = [line["step"] for line in metrics(tmp_path / "run", "checkpoint")]
    assert 20 <= stopped_at < 300
    status, _, errors = run(PYTHON, [*flags, "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    assert_each_step_once(tmp_path / "run")
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_of_one_process_trains_on_the_gpu(toy, tmp_path, launcher):
    """torchrun connects its one process over NCCL."""
    status, output, errors = run(LAUNCHERS[launcher], toy.flags(tmp_path / "run"))
    assert status == 0, errors
    assert json.loads(output.splitlines()[-1])["perplexity"] > 1
    assert torch.cuda.get_device_name() in (tmp_path / "run" / "run.json").read_text()
