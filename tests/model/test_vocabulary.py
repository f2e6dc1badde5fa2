"""The rows of a model's tables: the vocabulary may grow, the positions end."""

from pathlib import Path

import pytest
import torch

from mlm.errors import UserError
from mlm.model.load import ModelConfig, load_model
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import max_positions
from tests.model.small_models import ARCHITECTURES, VOCAB, batch, small_model, tokenizer_of


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
    assert model(*batch()[:2]).shape == (7, VOCAB + 13)


def test_model_that_cannot_be_enlarged_is_a_mistake(tmp_path: Path):
    small_model("esm").save_pretrained(tmp_path)  # transformers leaves the bias of ESM's head at its old size
    with pytest.raises(UserError, match=f"{VOCAB + 1} rows"):
        load_model(ModelConfig(str(tmp_path)), tokenizer_of(VOCAB + 1), seed=0)


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


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2", "esm", "eurobert", "modernbert"])
def test_relative_and_rotary_positions_have_no_limit(model_type: str):
    assert max_positions(small_model(model_type).config) is None
