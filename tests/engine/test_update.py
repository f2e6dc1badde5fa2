"""One optimizer step: any optimizers, whatever runs out, however it overflows (invariants 2 and 9)."""

import copy
import itertools
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.optim import lr_scheduler
from transformers import get_scheduler

from mlm.data.batches import Batches
from mlm.data.chunks import ChunkConfig, cut_into_chunks
from mlm.data.corpus import CorpusConfig
from mlm.data.masking import MaskingConfig, make_recipe
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.engine.checkpoint import load, snapshot, write
from mlm.engine.memory import out_of_memory
from mlm.engine.update import Update, UpdateConfig
from mlm.errors import UserError
from mlm.model.load import ModelConfig, load_model
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import objective, select
from tests.runs import assert_same_bits, assert_same_weights, half_precision

STEPS = 4


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    tokenizer = load_tokenizer(str(toy.checkpoint))
    info = tokenizer_info(tokenizer)
    source = CorpusConfig(train_file=str(toy.train_file), validation_file=str(toy.validation_file), allow_leaks=True)
    store = TokenStoreConfig(token_store=str(tmp_path_factory.mktemp("stores")))
    chunks = cut_into_chunks(prepare(source, tokenizer, info, store)["train"], ChunkConfig(), 16, info)
    choose = partial(select, masking=MaskingConfig())
    return tokenizer, Batches(chunks, make_recipe(info), info.maskable, choose, lambda step: 0.15, 7, 8)


def make_update(toy, data, optimizers, accelerator=None, loss=objective, dropout=0.0, **config):
    """An update of the toy's model. optimizers: from its named parameters, a list of optimizers."""
    tokenizer, batches = data
    model = SparseMaskedLM(load_model(ModelConfig(str(toy.checkpoint), dropout=dropout), tokenizer, 0)).train()
    made = optimizers(dict(model.named_parameters()))
    schedulers = [get_scheduler("linear", optimizer, 0, STEPS) for optimizer in made]
    config = UpdateConfig(train_batch_size=8, **{"per_device_train_batch_size": "auto", **config})
    return Update(model, loss, batches, made, schedulers, accelerator or Accelerator(cpu=True), config)


def weights(update):
    return update.model.model.state_dict()


def fused(named):
    return [torch.optim.AdamW(named.values(), lr=5e-3, fused=True)]


def plain(named):
    return [torch.optim.AdamW(named.values(), lr=5e-3)]


def sgd(named):
    return [torch.optim.SGD(named.values(), lr=0.1, momentum=0.9)]


def two(named):
    """Muon for the encoder's matrices, AdamW for all else."""
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and "embedding" not in name}
    others = [p for name, p in named.items() if name not in matrices]
    return [torch.optim.Muon(matrices.values(), lr=0.02), torch.optim.AdamW(others, lr=5e-3)]


optimizers = pytest.mark.parametrize("optimizers", [fused, plain, sgd, two])


@optimizers
def test_a_step_is_that_of_a_plain_loop_whatever_the_optimizers(toy, data, optimizers):
    update = make_update(toy, data, optimizers)
    other = make_update(toy, data, optimizers)  # for its model and optimizers alone
    for step in range(STEPS):
        applied = update(step)
        [batch], masked = data[1].load(step, 8)
        loss = objective(other.model, batch).sum()
        (loss / masked).backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        for optimizer, scheduler in zip(other.optimizers, other.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        other.model.zero_grad()
        assert applied.masked == masked
        torch.testing.assert_close(applied.sums, loss.detach()[None])
    assert_same_weights(weights(update), weights(other))
    assert all(scheduler.get_last_lr() == [0.0] for scheduler in update.schedulers)


@optimizers
def test_a_gradient_that_is_not_finite_moves_no_weight_of_any_optimizer_nor_does_a_later_one(toy, data, optimizers):
    steps = itertools.count()

    def poisoned(model, batch):
        return objective(model, batch) * (torch.nan if next(steps) == 2 else 1.0)

    update = make_update(toy, data, optimizers, loss=poisoned)
    flags = []
    for step in range(STEPS):
        if step == 2:
            good = {name: tensor.clone() for name, tensor in weights(update).items()}
        flags.append(float(update(step).nonfinite))
    assert flags == [0.0, 0.0, 1.0, 1.0]
    assert_same_bits(weights(update), good)


@optimizers
def test_an_fp16_overflow_moves_nothing_and_is_taken_again_at_a_lower_scale(toy, data, optimizers):
    calm = make_update(toy, data, optimizers, half_precision(2.0**10))
    calm_steps = [calm(step) for step in range(STEPS)]
    stormy = make_update(toy, data, optimizers, half_precision(2.0**40))
    stormy_steps = [stormy(step) for step in range(STEPS)]
    assert sum(applied.overflows for applied in calm_steps) == 0
    assert sum(applied.overflows for applied in stormy_steps) > 5
    assert stormy.schedulers[0].last_epoch == STEPS
    for one, other in zip(calm_steps, stormy_steps, strict=True):
        torch.testing.assert_close(one.sums, other.sums, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_that_ran_out_of_memory_is_taken_again_with_the_weights_as_they_are(toy, data, precision):
    """An autocast that stays open keeps its cache of weights in bf16, which later steps would train on."""
    calls = itertools.count()

    def short(model, batch):
        loss = objective(model, batch)
        if next(calls) == 9:  # amid step 2, in micro-batches of two; half of them are behind it
            raise torch.OutOfMemoryError("no memory")
        return loss

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    found = make_update(toy, data, fused, accelerator, loss=short)
    found.micro_batch = 2
    whole = make_update(toy, data, fused, accelerator)
    whole.micro_batch = 2
    for step in range(STEPS):
        if step == 2:
            whole.micro_batch = 1
        found(step)
        whole(step)
    assert not torch.is_autocast_enabled("cpu")
    assert found.micro_batch == 1
    assert_same_bits(weights(found), weights(whole))


def test_memory_for_the_optimizers_first_state_is_named(toy, data):
    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("no memory")

    update = make_update(toy, data, lambda named: [Greedy(named.values(), lr=0.1)])
    with pytest.raises(UserError, match="out of memory for the state of Greedy"):
        update(0)


def test_libraries_that_cannot_allocate_are_out_of_memory():
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert out_of_memory(RuntimeError(words))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


@optimizers
def test_what_it_saves_puts_it_back_to_the_bit(toy, data, optimizers):
    """Dropout's draws are those of the step, so that no generator has a state to save."""
    one = make_update(toy, data, optimizers, dropout=0.1)
    other = make_update(toy, data, optimizers, dropout=0.1)
    for step in range(2):
        one(step)
    other.model.load_state_dict(one.model.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(2, STEPS):
        one(step)
        other(step)
    assert_same_bits(weights(one), weights(other))


def in_sequence(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, 2)], [1])


def in_a_chain(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    return lr_scheduler.ChainedScheduler([warm_up, lr_scheduler.ExponentialLR(optimizer, 0.9)])


@pytest.mark.parametrize(
    "schedule",
    [in_sequence, in_a_chain, lambda o: lr_scheduler.MultiStepLR(o, [1, 3])],
    ids=["in sequence", "in a chain", "in steps"],
)
def test_schedules_without_a_rule_are_put_back_too(toy, data, tmp_path, schedule):
    one, other = make_update(toy, data, plain), make_update(toy, data, plain)
    one.schedulers, other.schedulers = ([schedule(update.optimizers[0])] for update in (one, other))
    one(0)
    one(1)
    write(tmp_path / "step_2", snapshot(one.model.model, {"update": one}, {}))
    load(tmp_path / "step_2", other.model.model, {"update": other}, {}, other.accelerator)
    assert one.step == other.step == 2
    one(2)
    other(2)
    assert_same_bits(weights(one), weights(other))


def test_named_scalars_are_sums_over_the_masked_tokens_however_the_batch_is_cut(toy, data):
    def counting(model, batch):
        return objective(model, batch), {"count": torch.tensor(len(batch.targets))}

    sums = [make_update(toy, data, fused, loss=counting, per_device_train_batch_size=micro)(0) for micro in (8, 3)]
    assert [applied.sums[1].item() for applied in sums] == [applied.masked for applied in sums]


def test_scalars_that_change_their_names_are_an_error(toy, data):
    steps = itertools.count()

    def changing(model, batch):
        return objective(model, batch), ({"a": torch.ones(())} if next(steps) else {})

    update = make_update(toy, data, fused, loss=changing)
    update(0)
    with pytest.raises(ValueError, match=r"\(\) beside its loss, and now \('a',\)"):
        update(1)


def test_what_no_optimizer_holds_neither_moves_nor_counts_in_the_gradients_norm(toy, data):
    """As where a fork trains the head alone."""

    def head(named):
        return [torch.optim.SGD([p for name, p in named.items() if "cls" in name], lr=0.1)]

    update = make_update(toy, data, head)
    before = {name: tensor.clone() for name, tensor in weights(update).items()}
    update(0)
    moved = {name for name, tensor in weights(update).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("cls" in name for name in moved)
    [batch], masked = data[1].load(0, 8)
    other = make_update(toy, data, head)
    (objective(other.model, batch).sum() / masked).backward()
    torch.nn.utils.clip_grad_norm_(other.parameters, 1.0)
    other.optimizers[0].step()
    assert_same_weights(weights(update), weights(other))


def test_a_parameter_beside_the_model_is_clipped_stepped_and_cleared_too(toy, data):
    beside = torch.nn.Parameter(torch.ones(()))

    def more(model, batch):
        return objective(model, batch).sum() + beside

    update = make_update(toy, data, lambda named: [torch.optim.SGD([*named.values(), beside], lr=0.1)], loss=more)
    update(0)
    assert beside.grad is None
    assert beside.item() < 1.0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: objective(model, batch).detach(), "has a gradient"),
        (lambda model, batch: 1.0, "has a gradient"),
        (lambda model, batch: (objective(model, batch), {"loss": torch.ones(())}), "a name that the log has"),
    ],
)
def test_an_objective_that_cannot_be_is_named(toy, data, loss, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make_update(toy, data, fused, loss=loss)(0)


def test_each_optimizer_has_a_schedule_and_each_parameter_one_optimizer(toy, data):
    with pytest.raises(ValueError, match="one optimizer"):
        make_update(toy, data, lambda named: [*fused(named), *fused(named)])


def test_frozen_parameters_stay_as_they_are_in_an_optimizer_that_holds_and_decays_them(toy, data):
    def decaying(named):
        named["model.bert.embeddings.word_embeddings.weight"].requires_grad_(False)
        return [torch.optim.AdamW(named.values(), lr=0.1, weight_decay=0.5)]

    update = make_update(toy, data, decaying)
    before = weights(update)["bert.embeddings.word_embeddings.weight"].clone()
    update(0)
    assert torch.equal(weights(update)["bert.embeddings.word_embeddings.weight"], before)
