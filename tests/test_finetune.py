"""Fine-tuning, the second opinion: the same labels, heads, order and dropout for both models."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining

from mlm.data.corpus import CorpusConfig
from mlm.data.task import TaskConfig, read_task
from mlm.errors import UserError
from tests.scripts import load_script

script = load_script("finetune")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two kinds of sentences that one word tells apart."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("task") / "labelled.jsonl"
    rows = [
        {"text": f"the {rng.choice(['old', 'young'])} {animal} likes {rng.choice(['milk', 'bones'])}", "label": animal}
        for animal in ("cat", "dog")
        for _ in range(15)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def base(toy, tmp_path_factory):
    """A checkpoint with a pooler, which the toy's, as train.py saves it, lacks."""
    folder = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(toy.checkpoint).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertForPreTraining(BertConfig.from_pretrained(toy.checkpoint)).save_pretrained(folder)
    return folder


def flags(toy, labelled, **more):
    settings = {"model_name_or_path": toy.checkpoint, "compare": toy.checkpoint, "task_file": labelled, "labels": 6}
    return [f"--{name}={value}" for name, value in {**settings, "learning_rate": 5e-3, **more}.items()]


def test_a_model_that_is_the_base_is_exactly_as_good_and_both_learn(toy, labelled, tmp_path, capsys):
    output = tmp_path / "figures.json"
    figures = script.main(flags(toy, labelled, output=output))
    assert figures["accuracy"] == figures["accuracy_before"] >= 0.8
    assert figures["accuracy_difference"] == figures["accuracy_low"] == figures["accuracy_high"] == 0
    assert (figures["splits"], figures["documents"], figures["labels_a_class"]) == (10, 30, 6)
    assert json.loads(output.read_text()) == figures
    printed = capsys.readouterr().out
    assert "difference 0 points (no prediction differs)" in printed
    assert "95% interval" not in printed, "of no width"


def test_the_difference_is_that_of_the_model_to_the_one_it_is_compared_with(toy, labelled, tmp_path):
    """Here to one of zeros, which sees nothing and learns nothing."""
    blind = BertForMaskedLM.from_pretrained(toy.checkpoint)
    with torch.no_grad():
        for parameter in blind.parameters():
            parameter.zero_()
    blind.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy.checkpoint).save_pretrained(tmp_path)
    figures = script.main(flags(toy, labelled, compare=tmp_path))
    assert figures["accuracy_before"] <= 0.6 < 0.8 <= figures["accuracy"]
    assert figures["accuracy_difference"] == pytest.approx(figures["accuracy"] - figures["accuracy_before"])
    assert 0 < figures["accuracy_low"] < figures["accuracy_high"]


def test_head_and_pooler_start_as_the_same_tensors_whichever_checkpoint_has_them(toy, base, labelled):
    task = read_task(TaskConfig(task_file=str(labelled)), CorpusConfig())
    names = {"before": str(base), "after": str(toy.checkpoint)}
    loaded = {when: script.load(name, task) for when, name in names.items()}
    lacking = script.common_lack(names, loaded)
    fresh = {f"{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    assert set(lacking) == fresh
    assert loaded["before"][1] == {"classifier.weight", "classifier.bias"}

    def started(when, seed):
        with script.seeded(seed, torch.device("cpu")):
            return script.start(loaded[when][0], loaded["before"][0], lacking).state_dict()

    before, after, other = started("before", 3), started("after", 3), started("after", 4)
    for name, tensor in after.items():
        own = loaded["after"][0].state_dict()[name]
        assert torch.equal(tensor, before[name] if name in fresh else own), name
    assert not torch.equal(before["bert.pooler.dense.weight"], loaded["before"][0].bert.pooler.dense.weight)
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        assert not torch.equal(after[name], other[name])


def test_a_base_that_only_has_a_pooler_more_is_exactly_as_good(toy, labelled, tmp_path, capsys):
    """The same encoder twice, once saved with a pooler, which fine-tuning must not profit from."""
    model = BertForPreTraining.from_pretrained(toy.checkpoint)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy.checkpoint).save_pretrained(tmp_path)
    figures = script.main(flags(toy, labelled, compare=tmp_path, epochs=2))
    assert figures["accuracy_low"] == figures["accuracy_difference"] == figures["accuracy_high"] == 0
    assert "bert.pooler.dense.weight" in capsys.readouterr().out


def test_a_batch_is_what_the_tokenizer_makes_of_its_documents(toy, labelled):
    """Each document is tokenised once, whatever batches it is in; pairs are cut as the tokenizer cuts them."""
    tokenizer, accelerator = AutoTokenizer.from_pretrained(toy.checkpoint), Accelerator(cpu=True)
    single = read_task(TaskConfig(task_file=str(labelled)), CorpusConfig())
    pairs = single._replace(texts=[(text, f"{text} and {text}") for (text,) in single.texts])
    for task, longest in ((single, 128), (single, 4), (pairs, 10)):
        rows, _ = script.encode(tokenizer, task, longest)
        for chosen in ([0, 17, 3], [29]):
            batch = script.padded(rows, tokenizer, accelerator, chosen)
            columns = [list(column) for column in zip(*(task.texts[i] for i in chosen), strict=True)]
            expected = tokenizer(*columns, truncation=True, max_length=longest, padding=True, return_tensors="pt")
            assert batch.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(batch[name], tensor), name


def test_markup_is_removed_where_it_was_from_the_text(toy, tmp_path, capsys):
    rows = [{"text": f"the {animal}<br />", "label": animal} for animal in ("cat", "dog") for _ in range(10)]
    file = tmp_path / "marked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, cut in (({}, True), ({"strip_html": True}, False)):
        script.main(flags(toy, file, max_seq_length=4, epochs=1, labels=2, **more))
        assert ("20 documents of 20 are cut" in capsys.readouterr().out) == cut


def test_documents_that_are_cut_are_counted(toy, labelled, capsys):
    script.main(flags(toy, labelled, max_seq_length=4, epochs=1))
    assert "30 documents of 30 are cut after 4 tokens (--max_seq_length)" in capsys.readouterr().out


def test_documents_are_cut_where_either_model_has_no_more_positions(toy, base, tmp_path, capsys):
    text = "the cat likes milk . " * 20  # 102 tokens, of 64 that the toy takes
    rows = [{"text": text.replace("cat", animal), "label": animal} for animal in ("cat", "dog") for _ in range(10)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.main(flags(toy, file, compare=base, max_seq_length=4096, labels=2, epochs=1))
    assert capsys.readouterr().out.count("20 documents of 20 are cut after 64 tokens (--max_seq_length)") == 2


def test_models_whose_heads_differ_in_shape_are_not_compared(toy, labelled, tmp_path):
    config = BertConfig.from_pretrained(toy.checkpoint, hidden_size=16)
    BertForPreTraining(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is no base of .*: their bert.pooler.dense.bias is of the shapes \(16,\)"):
        script.main(flags(toy, labelled, compare=tmp_path))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_dropout_is_seeded_on_the_device_and_its_generator_restored(device):
    def dropped():
        return torch.nn.functional.dropout(torch.ones(1000, device=device))

    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    seen = []
    for seed in (1, 1, 2):
        with script.seeded(seed, torch.device(device)):
            seen.append(dropped())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.cuda
def test_fp16_that_accelerate_is_configured_for_is_refused(toy, labelled, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=r"configured for fp16.*give --mixed_precision no or bf16"):
        script.main(flags(toy, labelled))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compare": "none"}, "give --model_name_or_path, --compare and --task_file"),
        ({"labels": 0}, "--labels 0: at least 1"),
        ({"labels": 10}, "--labels 10: at most 9 with "),
        ({"mixed_precision": "fp16"}, r"--mixed_precision: 'fp16' is not no\|bf16"),
        ({"seeds": 1}, "--seeds 1: at least 2"),
        ({"task_kind": "retrieval", "task_pair_column": "b"}, "--task_kind retrieval: fine-tuning is to classes"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(toy, labelled, more, message):
    with pytest.raises(UserError, match=message):
        script.main(flags(toy, labelled, **more))
