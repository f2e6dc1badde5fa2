"""The model card: what the Hub reads in it are the figures of the run."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
from mlm.report.model_card import model_card
from mlm.train import train


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    out_of_domain = folder.parent / toy.validation_file.name  # of the same name as the domain's
    out_of_domain.write_text("a young owl and a small fox like every old day .\n" * 20)
    train(toy.config(folder, modules={"out_of_domain": OutOfDomainConfig(out_of_domain_file=str(out_of_domain))}))
    return folder


def test_the_hub_reads_the_figures_of_the_run_in_the_card(run):
    results = json.loads((run / "all_results.json").read_text())
    card = ModelCard.load(run / "README.md")
    assert card.data.model_name == "toy"
    assert card.data.pipeline_tag == "fill-mask"
    figures = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert figures == {
        ("validation.txt", "perplexity"): results["perplexity"],
        ("validation.txt", "accuracy"): results["accuracy"],
        ("validation.txt", "bits_per_character"): results["bits_per_character"],
        **{
            ("validation.txt (out-of-domain text)", metric): results[f"out_of_domain_{metric}"]
            for metric in ("perplexity", "accuracy", "bits_per_character")
        },
    }
    assert {(r.task_type, r.dataset_split) for r in card.data.eval_results} == {("fill-mask", "validation")}
    assert "/" not in str([r.dataset_type for r in card.data.eval_results]), "a path says nothing elsewhere"


def test_the_card_tells_people_the_gain_and_what_was_forgotten(run):
    results = json.loads((run / "all_results.json").read_text())
    domain, out_of_domain = ModelCard.load(run / "README.md").text.split("On out-of-domain text, validation.txt:")
    for text, prefix in ((domain, ""), (out_of_domain, "out_of_domain_")):
        gain, low, high = (f"{results[prefix + name]:.4g}" for name in ("gain", "gain_low", "gain_high"))
        assert f"Perplexity before / after is {gain} (95% interval {low} to {high} over documents)." in text
        for name in ("perplexity", "accuracy", "bits_per_character"):
            before, after = (f"{results[f'{prefix}{name}{when}']:.4g}" for when in ("_before", ""))
            assert f"| {name.replace('_', ' ')} | {before} | {after} |" in text


def test_an_interval_over_chunks_is_said_to_be_of_one_document(toy, run):
    results = json.loads((run / "all_results.json").read_text())
    measured = {"gain": 2.0, "gain_low": 1.9, "gain_high": 2.1, "gain_documents": 1}
    card = model_card("toy", toy.config(), results | measured)
    assert "2 (95% interval 1.9 to 2.1 over chunks of one document)" in card


def test_figures_that_do_not_exist_are_left_out_of_the_metadata(toy, tmp_path):
    """The Hub's model-index takes no null: of too many unknown tokens the card gives no bits per character."""
    unknown = tmp_path / "unknown.txt"
    unknown.write_text(toy.validation_file.read_text() + "房间 早餐 服务员\n" * 20)
    train(toy.config(tmp_path / "run", validation_file=str(unknown), max_train_steps=1))
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"perplexity", "accuracy"}
    assert "| bits per character | undefined | undefined |" in card.text


def test_a_dataset_of_the_hub_keeps_its_name(toy, run):
    results = json.loads((run / "all_results.json").read_text())
    corpus = CorpusConfig(dataset_name="stanfordnlp/imdb", dataset_config_name="plain_text")
    card = ModelCard(model_card("toy", toy.config(modules={"corpus": corpus}), results))
    assert card.data.datasets == "stanfordnlp/imdb"
    [dataset] = {(r.dataset_type, r.dataset_config) for r in card.data.eval_results}
    assert dataset == ("stanfordnlp/imdb", "plain_text")


NASTY = '<img src=x onerror=alert(1)> | `a` [b](http://c) *d* _e_ # $f$ & "g" \x1b[31m\n---\n# h\udcff'


def test_names_are_shown_letter_for_letter(toy, run, tmp_path):
    """A folder or file of any name is no tag, link, table, heading or metadata of the card."""
    results = json.loads((run / "all_results.json").read_text())
    modules = {"corpus": CorpusConfig(train_file=f"data/{NASTY.replace('/', '⁄')}", validation_file="v|<b>.txt")}
    text = model_card(NASTY, toy.config(modules=modules), results)
    text.encode()  # as a file takes it
    assert "\x1b" not in text
    card = ModelCard(text)
    assert "\nh" not in card.text.replace("# h", "")
    assert {r.dataset_name for r in card.data.eval_results} == {"v|<b>.txt"}
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [card.text.strip().splitlines()[0]]
    prose, _, rest = card.text.partition("```python")
    code, _, after = rest.partition("```")
    for part in (prose, after):
        assert not re.search(r"(?<!\\)[<`\[*_$&]", part)
    assert json.loads(re.search(r'"fill-mask", (.*)\)', code)[1]) == card.data.model_name


def test_the_card_says_what_was_replayed(toy, tmp_path):
    general = tmp_path / "general_text.txt"
    general.write_text("a young owl and a small fox like every old day .\n" * 40)
    train(toy.config(tmp_path / "run", replay_file=str(general), replay_share=0.25))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Of the chunks that it was trained on, 25% are from general" in card
    assert str(tmp_path) not in card
