"""The model's claims: law 8 (sparse equals dense) for sixteen architectures, and what loading promises."""

import copy
import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import MaskedLMOutput

from mlm.errors import UserError
from mlm.model.load import (
    DEMO_VOCABULARY,
    ModelConfig,
    demo_config,
    load_model,
    position_limit,
    vocabulary_size,
)
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import max_positions

TINY_CHECKPOINT = Path(__file__).parents[2] / "shared/data/models/bert-tiny-wikitext"
VOCAB = 100
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
ARCHITECTURES = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": {},
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "esm": {"mask_token_id": 4, "token_dropout": True, "position_embedding_type": "rotary"},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 2},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    "mpnet": {},
    "roberta": {},
    "roformer": {"embedding_size": 16},
    "xlm-roberta": {},
}


def small_model(model_type: str, **changes) -> PreTrainedModel:
    names = CONFIG_MAPPING[model_type].attribute_map  # DistilBERT says dim where the others say hidden_size
    common = {k: v for k, v in SMALL.items() if names.get(k, k) not in ARCHITECTURES[model_type]}
    config = CONFIG_MAPPING[model_type](**(common | ARCHITECTURES[model_type] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config)
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(
    rows: int = 3, length: int = 12, masked: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids [rows, length], sorted positions [masked] and targets [masked]."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    positions = torch.randperm(rows * length, generator=generator)[:masked].sort().values
    targets = input_ids.flatten()[positions]
    input_ids.view(-1)[positions[::2]] = 4  # half of the masked positions show a mask token
    return input_ids, positions, targets


def tokenizer_of(size: int = VOCAB) -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(size - len(specials)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    small_model("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="mlm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mlm")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Law 8: sparse equals dense


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
    nats, hits = sparse(input_ids, positions, targets, attention_mask)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), dense_nats, rtol=1e-6, atol=0)
    assert torch.equal(hits, dense_logits.argmax(-1) == targets)

    # The gradients are compared through float64 logits, so that nothing hides in float32's rounding.
    logits = sparse.logits(input_ids, positions, attention_mask)
    torch.testing.assert_close(logits, dense_logits, rtol=1e-9, atol=1e-12)
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
    sparse(input_ids, positions, targets)[0].sum().backward()
    F.cross_entropy(stock(input_ids).logits.flatten(0, 1)[positions], targets, reduction="sum").backward()
    for ours, theirs in zip(sparse.model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_masked_position_is_zero_loss_and_zero_gradients(model_type: str):
    model = SparseMaskedLM(small_model(model_type)).train()
    input_ids, _, _ = batch()
    nothing = torch.empty(0, dtype=torch.int64)
    nats, _ = model(input_ids, nothing, nothing)
    assert nats.shape == (0,)
    nats.sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and not p.grad.any() for p in trainable)


def test_model_called_on_its_own_is_the_stock_model():
    stock = small_model("bert").eval()
    sparse = SparseMaskedLM(copy.deepcopy(stock)).eval()
    input_ids, positions, targets = batch()
    sparse(input_ids, positions, targets)
    assert torch.equal(sparse.model(input_ids).logits, stock(input_ids).logits)


def test_model_called_on_its_own_is_dense_after_a_failed_step():
    sparse = SparseMaskedLM(small_model("bert")).eval()
    input_ids, positions, targets = batch()
    with pytest.raises(IndexError):
        sparse(input_ids + VOCAB, positions, targets)
    assert sparse.model(input_ids).logits.shape == (*input_ids.shape, VOCAB)


def test_hits_cost_nothing_in_training_mode():
    model = SparseMaskedLM(small_model("bert"))
    assert model.train()(*batch())[1] is None
    assert model.eval()(*batch())[1].dtype == torch.bool


def test_loss_is_float32_under_bf16_autocast():
    model = SparseMaskedLM(small_model("bert")).eval()
    exact, _ = model(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(*batch()[:2]).dtype == torch.bfloat16
        nats, _ = model(*batch())
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, exact, rtol=0.05, atol=0.05)
    logits = torch.full((1, 2), 300.0)  # log-sum-exp of bf16 logits this large is off by whole nats in bf16
    model.logits = lambda *_: logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats, _ = model(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(nats, torch.tensor([2.0]).log())


def test_compiled_forward_gives_the_same_loss():
    model = SparseMaskedLM(small_model("bert")).eval()
    compiled = torch.compile(model, backend="eager")
    for masked in (7, 5):  # the number of masked positions changes from batch to batch
        torch.testing.assert_close(compiled(*batch(masked=masked))[0], model(*batch(masked=masked))[0])


def test_data_parallel_forward_reduces_the_same_gradients(tmp_path: Path):
    model = SparseMaskedLM(small_model("esm")).eval()  # ESM's contact head gets no gradient
    alone = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)  # raises on its second step if a gradient stayed away
        for _ in range(2):
            parallel(*batch())[0].sum().backward()
            alone(*batch())[0].sum().backward()
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


# The trial at construction


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
    assert [kind.__name__ in line and reason in line for line in messages() if "all positions" in line] == [
        True
    ]
    assert not model.model.base_model._forward_hooks
    input_ids, positions, targets = batch()
    dense = stock(input_ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(model.logits(input_ids, positions), dense)
    torch.testing.assert_close(
        model(input_ids, positions, targets)[0], F.cross_entropy(dense, targets, reduction="none")
    )
    nothing = positions[:0]
    model(input_ids, nothing, nothing)[0].sum().backward()
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


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(model_type: str, tmp_path: Path):
    """Dropout included: what is computed again is drawn again from the same state."""
    small_model(model_type).save_pretrained(tmp_path)
    input_ids, positions, targets = batch()
    found = []
    for again in (False, True):
        config = ModelConfig(model_name_or_path=str(tmp_path), gradient_checkpointing=again, dropout=0.1)
        model = SparseMaskedLM(load_model(config, tokenizer_of(), seed=0)).train()
        calls = []
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        nats, _ = model(input_ids, positions, targets)
        nats.sum().backward()
        found.append((len(calls), [p.grad for p in model.parameters() if p.requires_grad]))
    (once, plain), (twice, checkpointed) = found
    assert twice > once  # layers ran again
    for mine, its in zip(plain, checkpointed, strict=True):
        assert torch.equal(mine, its)


def test_gradient_checkpointing_of_an_architecture_without_it_is_a_mistake(checkpoint: Path, monkeypatch):
    monkeypatch.setattr(BertForMaskedLM, "supports_gradient_checkpointing", False)
    config = ModelConfig(model_name_or_path=str(checkpoint), gradient_checkpointing=True)
    with pytest.raises(UserError, match="--gradient_checkpointing: BertForMaskedLM does not support"):
        load_model(config, tokenizer_of(), seed=0)


def test_trial_does_not_turn_big_birds_sparse_attention_off():
    config = CONFIG_MAPPING["big_bird"](**SMALL, attention_type="block_sparse")
    model = SparseMaskedLM(AutoModelForMaskedLM.from_config(config))
    assert model.sparse and model.model.bert.attention_type == "block_sparse"


# Loading


def test_checkpoint_loads_in_float32_whatever_it_stores(tmp_path: Path):
    stock = small_model("bert").bfloat16()
    stock.save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path)), tokenizer_of(), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, stock.get_input_embeddings().weight.float()
    )


def test_real_checkpoint_fits_and_loses_nothing(messages):
    if not TINY_CHECKPOINT.exists():
        pytest.skip(f"needs the checkpoint {TINY_CHECKPOINT.name}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_CHECKPOINT)
    model = SparseMaskedLM(load_model(ModelConfig(str(TINY_CHECKPOINT)), tokenizer, seed=0)).eval()
    assert model.sparse and not messages()
    encoded = tokenizer("The capital of France is [MASK].", return_tensors="pt")["input_ids"]
    position = (encoded.flatten() == tokenizer.mask_token_id).nonzero()[:, 0]
    with torch.no_grad():
        stock = AutoModelForMaskedLM.from_pretrained(TINY_CHECKPOINT).eval()(encoded).logits.flatten(0, 1)
        torch.testing.assert_close(model.logits(encoded, position), stock[position])


def test_pickled_weights_load(checkpoint: Path):
    weights = small_model("bert").state_dict()
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    model = load_model(ModelConfig(str(checkpoint)), tokenizer_of(), seed=0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_with_code_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, how: str):
    (checkpoint / "model.safetensors").unlink()
    content = {"bert.embeddings.word_embeddings.weight": Malice(tmp_path / "ran")}
    if how == "torch":
        torch.save(content, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="cannot load the model in") as error:
        load_model(ModelConfig(str(checkpoint)), tokenizer_of(), seed=0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_missing_head_is_named_and_drawn_from_the_seed(tmp_path: Path, messages):
    BertForSequenceClassification(BertConfig(**SMALL)).save_pretrained(tmp_path)
    generator = torch.get_rng_state()
    first, again, other = (load_model(ModelConfig(str(tmp_path)), tokenizer_of(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), generator)
    assert len(messages()) == 3 and "cls.predictions.transform.dense.weight" in messages()[0]
    drawn = [model.cls.predictions.transform.dense.weight for model in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("size", [VOCAB - 20, VOCAB, VOCAB + 13])
def test_embeddings_grow_for_a_larger_tokenizer_and_never_shrink(checkpoint: Path, size: int):
    first, again = (load_model(ModelConfig(str(checkpoint)), tokenizer_of(size), seed=3) for _ in range(2))
    rows = first.get_input_embeddings().weight
    assert len(rows) == first.config.vocab_size == max(size, VOCAB)
    assert torch.equal(rows[:VOCAB], small_model("bert").get_input_embeddings().weight)
    assert torch.equal(rows, again.get_input_embeddings().weight)
    assert SparseMaskedLM(first).sparse


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"esm"}))
def test_enlarged_model_keeps_its_sparse_head(model_type: str, tmp_path: Path):
    small_model(model_type).save_pretrained(tmp_path)
    model = SparseMaskedLM(load_model(ModelConfig(str(tmp_path)), tokenizer_of(VOCAB + 13), seed=0)).eval()
    assert model.sparse
    assert model.logits(*batch()[:2]).shape == (7, VOCAB + 13)


def test_model_that_cannot_be_enlarged_is_a_mistake(tmp_path: Path):
    small_model("esm").save_pretrained(tmp_path)  # transformers leaves the bias of ESM's head at its old size
    with pytest.raises(UserError, match=f"{VOCAB + 1} rows"):
        load_model(ModelConfig(str(tmp_path)), tokenizer_of(VOCAB + 1), seed=0)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert", "electra"])
def test_model_from_scratch_takes_the_tokenizers_ids_and_the_seed(model_type: str, tmp_path: Path):
    # The default sizes take seconds to initialise: the same configuration, made small, comes from a folder.
    changes = {} if model_type == "distilbert" else {"pad_token_id": 7}
    small_model(model_type, **changes).config.save_pretrained(tmp_path)
    tokenizer, generator = tokenizer_of(60), torch.get_rng_state()
    first, again, other = (
        load_model(ModelConfig(config_name=str(tmp_path)), tokenizer, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert first.config.model_type == model_type
    assert len(first.get_input_embeddings().weight) == first.config.vocab_size == 60
    assert first.config.pad_token_id == tokenizer.pad_token_id
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mobilebert"])
def test_model_type_alone_gives_its_default_architecture(model_type: str):
    model = load_model(ModelConfig(model_type=model_type), tokenizer_of(60), seed=0)
    default = CONFIG_MAPPING[model_type]()
    assert model.config.model_type == model_type
    assert model.config.num_hidden_layers == default.num_hidden_layers
    assert model.config.hidden_size == default.hidden_size
    assert model.config.vocab_size == 60
    assert next(model.parameters()).dtype == torch.float32


def test_without_a_name_it_is_the_demo_model():
    tokenizer = tokenizer_of(60)
    model = load_model(ModelConfig(), tokenizer, seed=0)
    assert isinstance(model, BertForMaskedLM)
    assert model.config.to_diff_dict() == demo_config(tokenizer).to_diff_dict() | {
        key: model.config.to_diff_dict()[key]
        for key in ("architectures", "dtype")
        if key in model.config.to_diff_dict()
    }


def test_vocabulary_to_train_is_as_large_as_the_model_means_it(checkpoint: Path):
    assert vocabulary_size(ModelConfig(model_type="roberta")) == CONFIG_MAPPING["roberta"]().vocab_size
    assert vocabulary_size(ModelConfig(config_name=str(checkpoint))) == VOCAB
    assert vocabulary_size(ModelConfig()) == DEMO_VOCABULARY


# Dropout


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_dropout_zero_makes_training_mode_deterministic(model_type: str, tmp_path: Path):
    small_model(model_type).save_pretrained(tmp_path)
    steps = {}
    for dropout in (0.0, 0.5):
        model = load_model(ModelConfig(str(tmp_path), dropout=dropout), tokenizer_of(), seed=0)
        model = SparseMaskedLM(model).train()
        steps[dropout] = [model(*batch())[0] for _ in range(2)]
    assert torch.equal(*steps[0.0])
    assert not torch.equal(*steps[0.5])


def test_saved_config_keeps_the_dropout_of_the_checkpoint(tmp_path: Path):
    small_model("bert", hidden_dropout_prob=0.3).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), dropout=0.0), tokenizer_of(VOCAB + 1), seed=0)
    assert model.bert.embeddings.dropout.p == 0.0
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert again.config.hidden_dropout_prob == 0.3
    assert again.config.attention_probs_dropout_prob == 0.1
    assert again.config.classifier_dropout is None
    assert again.config.vocab_size == VOCAB + 1


def test_token_dropout_of_esm_is_no_probability(tmp_path: Path):
    small_model("esm").save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), dropout=0.0), tokenizer_of(), seed=0)
    assert model.esm.embeddings.token_dropout is True


# Positions


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_max_positions_is_the_longest_sequence_the_model_takes(model_type: str):
    absolute = {"position_biased_input": True} if model_type.startswith("deberta") else {}
    absolute |= {"position_embedding_type": "absolute"} if model_type == "esm" else {}
    model = small_model(model_type, **absolute).eval()
    longest = max_positions(model.config)
    ids = batch(rows=1, length=(longest or 100) + 1)[0]
    with torch.no_grad():
        if longest is None:
            assert model(ids).logits.shape[1] == 101
        else:
            assert model(ids[:, :longest]).logits.shape[1] == longest
            with pytest.raises((IndexError, RuntimeError)):
                model(ids)


@pytest.mark.parametrize(
    "config",
    [ModelConfig(), ModelConfig(model_type="roberta"), ModelConfig(model_type="modernbert")],
    ids=["demo", "roberta", "modernbert"],
)
def test_the_position_limit_is_known_before_the_model_is_loaded(config: ModelConfig, monkeypatch):
    tokenizer = tokenizer_of(60)
    default = CONFIG_MAPPING[config.model_type]() if config.model_type else demo_config(tokenizer)
    with monkeypatch.context() as patch:
        patch.delattr("mlm.model.load.AutoModelForMaskedLM")
        assert position_limit(config) == max_positions(default)


def test_the_position_limit_is_that_of_the_named_checkpoint(checkpoint: Path):
    longest = max_positions(small_model("bert").config)
    assert position_limit(ModelConfig(str(checkpoint))) == longest
    assert position_limit(ModelConfig(config_name=str(checkpoint))) == longest


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2", "esm", "eurobert", "modernbert"])
def test_relative_and_rotary_positions_have_no_limit(model_type: str):
    assert max_positions(small_model(model_type).config) is None


# Mistakes


def mistake(config: ModelConfig) -> str:
    with pytest.raises(UserError) as error:
        load_model(config, tokenizer_of(), seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_any_integer_is_a_seed():
    first = {}
    for seed in (-1, 0, 2**64, 10**30):
        model = load_model(ModelConfig(), tokenizer_of(), seed)
        first[seed] = model.get_input_embeddings().weight[1, 0].item()
    assert first[0] == first[2**64]  # they count modulo 2**64
    assert len(set(first.values())) == 3


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 7.0, float("nan")])
def test_dropout_outside_its_range_is_a_mistake(dropout: float):
    with pytest.raises(UserError, match="--dropout"):
        ModelConfig(dropout=dropout)


def test_unknown_model_type_names_the_nearest():
    assert "modernbert" in mistake(ModelConfig(model_type="modern-bert"))


def test_folder_that_does_not_exist_is_told_from_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The switch of huggingface_hub itself, so that the test does not wait for a network's time-outs.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for folder in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        assert f"no such folder: {folder}" in mistake(ModelConfig(folder))
    assert "from the Hub" in mistake(ModelConfig("some-user/some-model"))
    assert "from the Hub" in mistake(ModelConfig(config_name="some-model"))


def test_folder_without_a_model_is_a_mistake(tmp_path: Path):
    assert str(tmp_path) in mistake(ModelConfig(str(tmp_path)))


def test_config_without_weights_is_a_mistake(checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in mistake(ModelConfig(str(checkpoint)))


def test_damaged_weights_are_a_mistake(checkpoint: Path):
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert str(checkpoint) in mistake(ModelConfig(str(checkpoint)))


def test_checkpoint_of_no_masked_lm_is_a_mistake(tmp_path: Path):
    GPT2Config().save_pretrained(tmp_path)
    assert "gpt2 is no masked language model" in mistake(ModelConfig(str(tmp_path)))


def test_weights_of_another_shape_are_a_mistake(checkpoint: Path):
    config = BertConfig.from_pretrained(checkpoint)
    config.hidden_size = 48
    config.save_pretrained(checkpoint)
    assert str(checkpoint) in mistake(ModelConfig(str(checkpoint)))


def test_code_of_a_checkpoint_runs_only_when_asked_for(checkpoint: Path, tmp_path: Path):
    config = BertConfig.from_pretrained(checkpoint)
    config.auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel"}
    config.save_pretrained(checkpoint)
    text = (checkpoint / "config.json").read_text().replace('"model_type": "bert"', '"model_type": "own"')
    (checkpoint / "config.json").write_text(text)
    (checkpoint / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert "--trust_remote_code" in mistake(ModelConfig(str(checkpoint)))
    assert not (tmp_path / "ran").exists()
