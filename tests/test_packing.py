"""Training with --pack_documents is training with padding, in fewer rows."""

import random

import pytest

from mlm.data.tokenizer import load_tokenizer
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import train
from tests.model.small_models import small_model
from tests.runs import ONE, TWO, assert_same_bits, assert_same_weights, cut_and_resumed, run, weights


@pytest.fixture(scope="module")
def documents(toy, tmp_path_factory):
    """Documents of one to four of the toy's sentences."""
    rng, file = random.Random(2), tmp_path_factory.mktemp("documents") / "train.txt"
    file.write_text("".join(" ".join(toy.sentence(rng) for _ in range(rng.randint(1, 4))) + "\n" for _ in range(200)))
    return str(file)


def settings(documents, **more):
    common = {"line_by_line": True, "max_seq_length": 40, "per_device_train_batch_size": 3}
    return {**common, "train_file": documents, "pack_documents": True, **more}


@pytest.fixture
def seen(monkeypatch):
    """The shapes of the rows that models are trained on."""
    shapes, forward = [], SparseMaskedLM.forward

    def watched(model, input_ids, positions, attention_mask=None):
        if model.training:
            shapes.append(tuple(input_ids.shape))
        return forward(model, input_ids, positions, attention_mask)

    monkeypatch.setattr(SparseMaskedLM, "forward", watched)
    return shapes


def test_the_weights_are_those_of_padded_rows_which_are_more(toy, documents, tmp_path, seen):
    packed = train(toy.config(tmp_path / "packed", **settings(documents)))
    rows = sum(rows for rows, _ in seen)
    seen.clear()
    padded = train(toy.config(tmp_path / "padded", **settings(documents, pack_documents=False)))
    assert_same_weights(packed.model.state_dict(), padded.model.state_dict())
    assert rows < 0.85 * sum(rows for rows, _ in seen)
    for figure in ("train_loss", "perplexity", "perplexity_before", "mask_rate"):
        assert packed.results[figure] == pytest.approx(padded.results[figure], rel=1e-4), figure
    assert packed.results["perplexity_before"] == padded.results["perplexity_before"], "evaluation is padded"


def test_a_run_is_resumed_to_the_bit(toy, documents, tmp_path):
    whole = train(toy.config(tmp_path / "whole", dropout=0.1, **settings(documents)))
    cut = toy.config(tmp_path / "cut", dropout=0.1, checkpointing_steps=5, **settings(documents))
    assert_same_bits(whole.model.state_dict(), cut_and_resumed(train, cut))


@pytest.mark.slow
def test_a_run_is_the_same_on_one_process_and_two(toy, documents, tmp_path):
    for processes in (ONE, TWO):
        flags = toy.flags(tmp_path / str(processes), **settings(documents))
        status, _, errors = run(processes, flags)
        assert status == 0, errors
    assert_same_weights(weights(tmp_path / "1"), weights(tmp_path / "2"))


def test_an_architecture_that_cannot_keep_documents_apart_is_trained_on_padded_rows(
    toy, documents, tmp_path, seen, caplog
):
    tokenizer = load_tokenizer(str(toy.checkpoint))
    tokenizer.save_pretrained(tmp_path / "convbert")
    convbert = small_model("convbert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    convbert.save_pretrained(tmp_path / "convbert")
    with caplog.at_level("WARNING", "mlm"):
        train(toy.config(tmp_path / "run", **settings(documents, model_name_or_path=str(tmp_path / "convbert"))))
    said = [message for message in caplog.messages if "documents are padded, not packed, as" in message]
    assert len(said) == 1
    assert sum(rows for rows, _ in seen) == 12 * 8, "a row for each document"
