"""Rows of several documents have the losses and gradients of padded ones, or are not used."""

import copy

import pytest
import torch

from mlm.errors import UserError
from mlm.model import sparse_head
from mlm.model.sparse_head import SparseMaskedLM
from tests.model.small_models import ARCHITECTURES, VOCAB, losses, small_model

LENGTH = 24
MIXING = {"convbert", "deberta", "deberta-v2", "esm", "mobilebert", "roformer"}  # roformer: with such weights as here
PACKING = sorted(ARCHITECTURES.keys() - MIXING)
WINDOW = {"modernbert": {"local_attention": 6}}  # shorter than the documents


def packing(model_type: str) -> SparseMaskedLM:
    model = small_model(model_type, **WINDOW.get(model_type, {})).double()
    return SparseMaskedLM(model, LENGTH, pack=True).eval()


def padded_and_packed() -> tuple[tuple, tuple]:
    """Documents of 11, 4, 7 and 9 tokens, in rows of their own and in two rows, with their targets."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(5, VOCAB, (n,), generator=generator) for n in (11, 4, 7, 9)]
    targets = [torch.randint(5, VOCAB, (3,), generator=generator) for _ in documents]
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=1)  # [4, 11]
    mask = torch.zeros_like(rows)
    for row, document in zip(mask, documents, strict=True):
        row[: len(document)] = 1
    positions = torch.cat([11 * row + torch.tensor([0, 2, len(d) - 1]) for row, d in enumerate(documents)])
    packed, numbers = torch.ones(2, LENGTH, dtype=torch.int64), torch.zeros(2, LENGTH, dtype=torch.int32)
    places, begins = [], ((0, 0), (0, 11), (0, 15), (1, 0))
    for (row, first), number, document in zip(begins, (1, 2, 3, 1), documents, strict=True):
        packed[row, first : first + len(document)] = document
        numbers[row, first : first + len(document)] = number
        places.append(LENGTH * row + first + torch.tensor([0, 2, len(document) - 1]))
    return (rows, positions, torch.cat(targets), mask), (packed, torch.cat(places), torch.cat(targets), numbers)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_which_architectures_keep_documents_apart_is_found_at_construction(model_type: str, messages):
    model = SparseMaskedLM(small_model(model_type), LENGTH, pack=True)
    assert model.packs == (model_type not in MIXING)
    said = [line for line in messages() if "documents are padded, not packed, as " in line]
    assert len(said) == (not model.packs)


@pytest.mark.parametrize("model_type", PACKING)
def test_losses_and_gradients_are_those_of_padded_rows(model_type: str):
    padded, packed = padded_and_packed()
    theirs = packing(model_type)
    ours = copy.deepcopy(theirs)
    expected, found = losses(theirs, *padded), losses(ours, *packed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the losses are taken in float32
    expected.sum().backward(), found.sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_type", PACKING)
def test_no_document_sees_another(model_type: str):
    model, (ids, positions, targets, numbers) = packing(model_type), padded_and_packed()[1]
    before = losses(model, ids, positions, targets, numbers)
    ids[0, 11:15] = (ids[0, 11:15] + 7) % VOCAB
    after = losses(model, ids, positions, targets, numbers)
    changed = torch.zeros(12, dtype=torch.bool)
    changed[3:6] = True  # of the second document
    assert torch.equal(after[~changed], before[~changed])
    assert (after[changed] != before[changed]).all()


def test_under_bf16_autocast_the_losses_are_close():
    padded, packed = padded_and_packed()
    model = SparseMaskedLM(small_model("bert"), LENGTH, pack=True).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(model, *packed), losses(model, *padded), rtol=0.05, atol=0.05)


apart = sparse_head.apart


def boolean(model, documents):
    return {**apart(model, documents), "attention_mask": (documents[:, :, None] == documents[:, None, :])[:, None]}


def going_on(model, documents):
    return {**apart(model, documents), "position_ids": torch.arange(documents.shape[1])[None]}


def without_window(model, documents):
    return {**apart(model, documents), "attention_mask": apart(model, documents)["attention_mask"]["full_attention"]}


@pytest.mark.parametrize(
    ("model_type", "changes", "wrong"),
    [
        ("bert", {"attn_implementation": "eager"}, boolean),
        ("bert", {}, going_on),
        ("modernbert", WINDOW["modernbert"], without_window),
    ],
)
def test_the_trial_notices_what_is_wrong(model_type: str, changes, wrong, monkeypatch):
    """A boolean mask, which eager attention adds to its scores; positions that go on; attention past a window."""
    assert SparseMaskedLM(small_model(model_type, **changes), LENGTH, pack=True).packs
    monkeypatch.setattr(sparse_head, "apart", wrong)
    assert not SparseMaskedLM(small_model(model_type, **changes), LENGTH, pack=True).packs


@pytest.mark.parametrize("pack", [True, False])
def test_a_model_that_was_not_found_to_keep_documents_apart_refuses_them(pack: bool):
    model = SparseMaskedLM(small_model("convbert" if pack else "bert"), LENGTH, pack=pack)
    with pytest.raises(UserError, match="cannot keep documents apart; leave --pack_documents out"):
        losses(model, *padded_and_packed()[1])
