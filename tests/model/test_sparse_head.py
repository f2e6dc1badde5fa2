"""Invariant 8, sparse equals dense, for sixteen architectures, and the trial that checks it at the start."""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from mlm.config import Config
from mlm.data.batches import Batch
from mlm.errors import UserError
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import objective, train
from tests.model.small_models import (
    ARCHITECTURES,
    ONE_LENGTH,
    SMALL,
    VOCAB,
    batch,
    losses,
    one_length_model,
    small_model,
)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_sparse_head_gives_the_loss_and_the_gradients_of_the_stock_model(model_type: str, padded: bool):
    stock = small_model(model_type).double().eval()
    sparse = SparseMaskedLM(copy.deepcopy(stock)).eval()
    assert sparse.sparse is True
    input_ids, positions, targets = batch()
    attention_mask = None
    if padded:  # the first row is half padding; what is masked in its other half must not attend to that
        attention_mask = torch.ones_like(input_ids)
        input_ids[0, 6:], attention_mask[0, 6:] = SMALL["pad_token_id"], 0
        keep = attention_mask.flatten()[positions] == 1
        positions, targets = positions[keep], targets[keep]
        assert positions.min() < 6

    extra = {"attention_mask": attention_mask} if padded else {}
    dense_logits = stock(input_ids, **extra).logits.flatten(0, 1)[positions]
    dense_nats = F.cross_entropy(dense_logits, targets, reduction="none")
    logits = sparse(input_ids, positions, attention_mask)
    torch.testing.assert_close(logits, dense_logits, rtol=1e-9, atol=1e-12)
    assert torch.equal(logits.argmax(-1), dense_logits.argmax(-1))
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(nats.double(), dense_nats, rtol=1e-6, atol=0)

    # The gradients are compared through float64 logits, so that nothing hides in float32's rounding.
    F.cross_entropy(logits, targets, reduction="sum").backward()
    dense_nats.sum().backward()
    for (name, ours), theirs in zip(sparse.model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is None or not ours.requires_grad:
            assert theirs.grad is None and ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradient_of_the_float32_loss_is_the_stock_models(model_type: str):
    stock = small_model(model_type).double().eval()
    sparse = SparseMaskedLM(copy.deepcopy(stock)).eval()
    input_ids, positions, targets = batch()
    losses(sparse, input_ids, positions, targets).sum().backward()
    F.cross_entropy(stock(input_ids).logits.flatten(0, 1)[positions], targets, reduction="sum").backward()
    for ours, theirs in zip(sparse.model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_masked_position_is_zero_loss_and_zero_gradients(model_type: str):
    model = SparseMaskedLM(small_model(model_type)).train()
    input_ids, _, _ = batch()
    nothing = torch.empty(0, dtype=torch.int64)
    nats = losses(model, input_ids, nothing, nothing)
    assert nats.shape == (0,)
    nats.sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and not p.grad.any() for p in trainable)


def test_model_called_on_its_own_is_the_stock_model():
    stock = small_model("bert").eval()
    sparse = SparseMaskedLM(copy.deepcopy(stock)).eval()
    input_ids, positions, _ = batch()
    sparse(input_ids, positions)
    assert torch.equal(sparse.model(input_ids).logits, stock(input_ids).logits)


def test_model_called_on_its_own_is_dense_after_a_failed_step():
    sparse = SparseMaskedLM(small_model("bert")).eval()
    input_ids, positions, _ = batch()
    with pytest.raises(IndexError):
        sparse(input_ids + VOCAB, positions)
    assert sparse.model(input_ids).logits.shape == (*input_ids.shape, VOCAB)


def test_training_and_evaluation_compute_nothing_but_the_logits():
    model = SparseMaskedLM(small_model("bert"))
    for mode in (model.train(), model.eval()):
        logits = mode(*batch()[:2])
        assert logits.shape == (7, VOCAB) and logits.dtype == torch.float32


def test_under_bf16_autocast_the_logits_are_bf16_and_the_loss_of_the_widened_is_close():
    model = SparseMaskedLM(small_model("bert")).eval()
    exact = losses(model, *batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*batch()[:2]).dtype == torch.bfloat16
        nats = losses(model, *batch())
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, exact, rtol=0.05, atol=0.05)


def test_the_objective_of_bf16_logits_is_taken_in_float32():
    logits = torch.full((1, 2), 300.0)  # log-sum-exp of bf16 logits this large is off by whole nats in bf16
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]), torch.tensor([0]), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = objective(lambda *_: logits.bfloat16(), batch)
    torch.testing.assert_close(nats, torch.tensor([2.0]).log())


def test_compiled_forward_gives_the_same_loss():
    model = SparseMaskedLM(small_model("bert")).eval()
    compiled = torch.compile(model, backend="eager")
    for masked in (7, 5):  # the number of masked positions changes from batch to batch
        torch.testing.assert_close(compiled(*batch(masked=masked)[:2]), model(*batch(masked=masked)[:2]))


def test_data_parallel_forward_reduces_the_same_gradients(tmp_path: Path):
    model = SparseMaskedLM(small_model("esm")).eval()  # ESM's contact head gets no gradient
    alone = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)  # raises on its second step if a gradient stayed away
        for _ in range(2):
            losses(parallel, *batch()).sum().backward()
            losses(alone, *batch()).sum().backward()
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


class HeadThatLooksAround(PreTrainedModel):
    """A masked LM whose head averages each position with its left neighbour: it needs the whole sequence."""

    config_class = BertConfig
    base_model_prefix = "body"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.body = BertForMaskedLM(config).bert
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MaskedLMOutput:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.out((states + states.roll(1, dims=1)) / 2))


class HeadThatReshapes(HeadThatLooksAround):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MaskedLMOutput:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.out(states.reshape(*input_ids.shape, -1)))


class BodyCalledInParts(HeadThatLooksAround):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MaskedLMOutput:
        states = self.body.encoder(self.body.embeddings(input_ids))[0]  # the hook on `body` never fires
        return MaskedLMOutput(logits=self.out(states))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (HeadThatLooksAround, "the sparse logits differ"),
        (HeadThatReshapes, "the sparse head fails with RuntimeError"),
        (BodyCalledInParts, "the sparse logits have the shape"),
    ],
)
def test_model_that_the_hook_does_not_fit_gets_the_dense_head_and_a_log_line(kind, reason, messages):
    torch.manual_seed(0)
    stock = kind(BertConfig(**SMALL)).eval()
    model = SparseMaskedLM(copy.deepcopy(stock)).eval()
    assert model.sparse is False
    assert [kind.__name__ in line and reason in line for line in messages() if "all positions" in line] == [True]
    assert not model.model.base_model._forward_hooks
    input_ids, positions, targets = batch()
    dense = stock(input_ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(model(input_ids, positions), dense)
    torch.testing.assert_close(
        losses(model, input_ids, positions, targets), F.cross_entropy(dense, targets, reduction="none")
    )
    nothing = positions[:0]
    losses(model, input_ids, nothing, nothing).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_parameters_that_the_loss_does_not_reach_are_frozen_and_named(messages):
    model = SparseMaskedLM(small_model("esm"))
    frozen = {name for name, p in model.model.named_parameters() if not p.requires_grad}
    assert frozen == {f"esm.contact_head.regression.{kind}" for kind in ("weight", "bias")}
    assert len(messages()) == 1 and all(name in messages()[0] for name in frozen)


def test_parameters_frozen_by_the_caller_stay_frozen():
    stock = small_model("bert")
    stock.bert.embeddings.requires_grad_(False)
    model = SparseMaskedLM(stock)
    assert not any(p.requires_grad for p in model.model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.model.bert.encoder.parameters())


@pytest.mark.parametrize("model_type", ["bert", "convbert", "esm", "mobilebert"])
def test_trial_leaves_weights_buffers_gradients_mode_and_generator_alone(model_type: str):
    stock = small_model(model_type).train()
    before, generator = copy.deepcopy(stock.state_dict()), torch.get_rng_state()
    model = SparseMaskedLM(stock)
    assert model.model is stock and stock.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in stock.parameters())
    assert all(torch.equal(before[name], value) for name, value in stock.state_dict().items())


def test_trial_leaves_no_copy_of_the_model_behind():
    """Not even until the garbage collector comes by."""

    def models() -> int:
        return sum(type(o) is BertForMaskedLM for o in gc.get_objects())

    stock = small_model("bert")
    gc.collect()
    gc.disable()
    try:
        before = models()
        _kept = SparseMaskedLM(stock)
        assert models() == before
    finally:
        gc.enable()


def test_trial_does_not_turn_big_birds_sparse_attention_off():
    config = CONFIG_MAPPING["big_bird"](**SMALL, attention_type="block_sparse")
    model = SparseMaskedLM(AutoModelForMaskedLM.from_config(config))
    assert model.sparse and model.model.bert.attention_type == "block_sparse"


# Architectures that take sequences of one length only


@pytest.mark.parametrize("model_type", ONE_LENGTH)
@pytest.mark.parametrize("length", [12, 24, 32])
def test_length_that_an_architecture_cannot_be_trained_at_is_a_mistake_that_names_the_right_one(
    model_type: str, length: int
):
    with pytest.raises(UserError, match=rf"on chunks of {length} tokens; give --max_seq_length 16 and") as error:
        SparseMaskedLM(one_length_model(model_type), length)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ONE_LENGTH)
def test_at_the_length_that_works_every_trainable_parameter_has_a_gradient_on_an_empty_share(model_type: str):
    model = SparseMaskedLM(one_length_model(model_type), 16).train()
    assert model.sparse
    model(batch(length=16)[0], torch.empty(0, dtype=torch.int64)).sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and not p.grad.any() for p in trainable)


@pytest.mark.parametrize("model_type", ONE_LENGTH)
def test_a_trial_step_that_fails_freezes_nothing_where_the_model_is_not_trained(model_type: str, messages):
    model = SparseMaskedLM(one_length_model(model_type))
    assert all(p.requires_grad for p in model.parameters())
    assert any("no parameter is frozen, as the trial step fails with" in line for line in messages())


def test_architecture_that_runs_at_no_length_is_a_mistake():
    config = CONFIG_MAPPING["xmod"](**SMALL)  # needs a default language
    with pytest.raises(UserError, match=r"XmodForMaskedLM cannot be trained .* Input language unknown"):
        SparseMaskedLM(AutoModelForMaskedLM.from_config(config), 16)


def test_a_run_at_such_a_length_ends_in_one_line_before_it_trains(tmp_path: Path):
    one_length_model("nystromformer").config.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"the old fox likes {i} grapes\n" for i in range(200)))
    config = Config.of(
        config_name=str(tmp_path / "model"),
        train_file=str(tmp_path / "text.txt"),
        token_store=str(tmp_path / "stores"),
        output_dir=str(tmp_path / "run"),
        max_seq_length=12,
    )
    with pytest.raises(UserError, match="on chunks of 12 tokens; give --max_seq_length 16 and"):
        train(config, Accelerator(cpu=True))
