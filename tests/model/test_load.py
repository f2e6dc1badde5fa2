"""What loading a model promises, and the mistakes that it answers in one line."""

import dataclasses
import os
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from mlm.config import Config
from mlm.errors import UserError
from mlm.model.load import DEMO, ModelConfig, load_model, load_trained, model_config, open_corpus, position_limit
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import max_positions
from mlm.report.run_directory import RunConfig
from mlm.train import train
from tests.conftest import REPOSITORY
from tests.model.small_models import (
    ARCHITECTURES,
    SMALL,
    VOCAB,
    batch,
    losses,
    one_length_model,
    small_model,
    tokenizer_of,
)
from tests.processes import server
from tests.runs import finish

TINY_CHECKPOINT = Path(__file__).parents[3] / "shared/data/models/bert-tiny-wikitext"


def test_checkpoint_loads_in_float32_whatever_it_stores(tmp_path: Path):
    stock = small_model("bert").bfloat16()
    stock.save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path)), tokenizer_of(), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, stock.get_input_embeddings().weight.float())


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
        torch.testing.assert_close(model(encoded, position), stock[position])


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


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert", "electra"])
def test_model_from_scratch_takes_the_tokenizers_ids_and_the_seed(model_type: str, tmp_path: Path):
    # The default sizes take seconds to initialise: the same configuration, made small, comes from a folder.
    changes = {} if model_type == "distilbert" else {"pad_token_id": 7}
    small_model(model_type, **changes).config.save_pretrained(tmp_path)
    tokenizer, generator = tokenizer_of(60), torch.get_rng_state()
    first, again, other = (load_model(ModelConfig(config_name=str(tmp_path)), tokenizer, seed=s) for s in (1, 1, 2))
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
    own, size = model.config.to_diff_dict(), {"vocab_size": 60, "pad_token_id": tokenizer.pad_token_id}
    made = {key: own[key] for key in ("architectures", "dtype") if key in own}
    assert own == model_config(ModelConfig()).to_diff_dict() | size | made


def test_vocabulary_to_train_is_as_large_as_the_model_means_it(checkpoint: Path):
    assert model_config(ModelConfig(model_type="roberta")).vocab_size == CONFIG_MAPPING["roberta"]().vocab_size
    assert model_config(ModelConfig(config_name=str(checkpoint))).vocab_size == VOCAB
    assert model_config(ModelConfig()).vocab_size == DEMO["vocab_size"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_dropout_zero_makes_training_mode_deterministic(model_type: str, tmp_path: Path):
    small_model(model_type).save_pretrained(tmp_path)
    steps = {}
    for dropout in (0.0, 0.5):
        model = load_model(ModelConfig(str(tmp_path), dropout=dropout), tokenizer_of(), seed=0)
        model = SparseMaskedLM(model).train()
        steps[dropout] = [model(*batch()[:2]) for _ in range(2)]
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


@pytest.mark.parametrize(
    "config",
    [ModelConfig(), ModelConfig(model_type="roberta"), ModelConfig(model_type="modernbert")],
    ids=["demo", "roberta", "modernbert"],
)
def test_the_position_limit_is_known_before_the_model_is_loaded(config: ModelConfig, monkeypatch):
    default = CONFIG_MAPPING[config.model_type]() if config.model_type else model_config(config)
    with monkeypatch.context() as patch:
        patch.delattr("mlm.model.load.AutoModelForMaskedLM")
        assert position_limit(config) == max_positions(default)


def corpus_of(toy, folder: Path, text: str) -> Config:
    (folder / "text.txt").write_text(text)
    return toy.config(train_file=str(folder / "text.txt"), validation_file=str(toy.validation_file))


def test_more_than_one_in_a_hundred_unknown_tokens_are_said(toy, tmp_path: Path, caplog):
    sentence = "the old cat likes milk every day .\n"  # eight tokens
    with caplog.at_level("WARNING", "mlm"):
        open_corpus(corpus_of(toy, tmp_path, sentence * 20 + "the 房 likes milk\n"))
        assert not caplog.messages
        open_corpus(corpus_of(toy, tmp_path, sentence * 20 + "the 房 likes 早 milk\n"))
    [said] = caplog.messages
    assert said.startswith("1.2% of the tokens of the train split are unknown to the tokenizer")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_of_unknown_tokens_alone_is_refused(toy, tmp_path: Path, split: str):
    config = corpus_of(toy, tmp_path, "房间\n早餐\n" * 50)
    if split == "validation":
        swapped = {"train_file": config.corpus.validation_file, "validation_file": config.corpus.train_file}
        config = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, **swapped))
    with pytest.raises(UserError, match=f"^100.0% of the tokens of the {split} split are unknown .*--tokenizer_name"):
        train(dataclasses.replace(config, run=RunConfig(output_dir=str(tmp_path / "run"))))
    assert not (tmp_path / "run").exists()


def test_the_position_limit_is_that_of_the_named_checkpoint(checkpoint: Path):
    longest = max_positions(small_model("bert").config)
    assert position_limit(ModelConfig(str(checkpoint))) == longest
    assert position_limit(ModelConfig(config_name=str(checkpoint))) == longest


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


def test_architecture_without_token_embeddings_is_a_mistake(tmp_path: Path):
    sizes = {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1}
    CONFIG_MAPPING["perceiver"](**sizes).save_pretrained(tmp_path)
    assert "PerceiverForMaskedLM" in mistake(ModelConfig(config_name=str(tmp_path)))


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
        losses(model, input_ids, positions, targets).sum().backward()
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


@pytest.fixture(scope="module")
def nystromformer(tmp_path_factory) -> Path:
    """It takes 16 tokens, no more and no fewer."""
    folder = tmp_path_factory.mktemp("nystromformer")
    one_length_model("nystromformer").save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("length", [None, 12, 24, 32])
def test_a_model_of_one_length_is_refused_for_sequences_of_another(nystromformer: Path, length: int | None):
    with pytest.raises(UserError, match=r"takes sequences of 16 tokens only.*--max_seq_length 16"):
        load_trained(ModelConfig(str(nystromformer)), tokenizer_of(), "cpu", length)


def test_a_model_of_one_length_is_loaded_for_that(nystromformer: Path, messages):
    model = load_trained(ModelConfig(str(nystromformer)), tokenizer_of(), "cpu", 16).eval()
    assert model.sparse and not messages()
    assert model(*batch(length=16)[:2]).shape == (7, VOCAB)


@pytest.mark.parametrize("kind", ["fill_mask", "pseudo_perplexity", "evaluate"])
def test_a_script_that_meets_a_model_of_one_length_ends_in_one_line(kind: str, nystromformer: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("".join(f"w{i} w2 w3 w4\n" for i in range(60)))
    name = "fill_mask" if kind == "fill_mask" else "evaluate"
    flags = {
        "fill_mask": ["w1 w2 [MASK]"],
        "pseudo_perplexity": ["--pseudo_perplexity", "text.txt"],
        "evaluate": ["--validation_file", "text.txt", "--max_seq_length", "12", "--token_store", "stores"],
    }
    command = [str(REPOSITORY / f"scripts/{name}.py"), "--model_name_or_path", str(nystromformer), *flags[kind]]
    status, output, errors = finish(server().start(command, folder=tmp_path))
    assert (status, output) == (2, "")
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"error: {nystromformer}: NystromformerForMaskedLM takes sequences")
