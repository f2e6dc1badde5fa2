"""scripts/outlook.py: what prepare.py says before a run is what the run measures, and what has been recorded."""

import json
import math
import re

import pytest
from transformers import AutoModelForMaskedLM

from mlm.train import train
from tests.conftest import REPOSITORY
from tests.scripts import load_script

script = load_script("outlook")


@pytest.fixture
def prepare(toy, tmp_path, capsys):
    def call(*flags, model=True):
        where = "--model_name_or_path" if model else "--tokenizer_name"
        texts = ["--train_file", str(toy.train_file), "--validation_file", str(toy.validation_file), "--allow_leaks"]
        own = [where, str(toy.checkpoint), "--token_store", str(tmp_path / "stores"), "--max_seq_length", "16"]
        return load_script("prepare").main([*own, *texts, *flags])["outlook"], capsys.readouterr().out

    return call


def test_the_base_s_perplexity_is_that_of_documents_one_by_one_in_a_run(toy, prepare, tmp_path):
    found, printed = prepare()
    results = train(toy.config(tmp_path / "run", max_train_steps=1, max_eval_samples=script.DOCUMENTS)).results
    assert found["perplexity"] == pytest.approx(results["documents_perplexity_before"])
    assert f"perplexity             {found['perplexity']:.4g}, documents one by one; of four in five" in printed
    low, middle, high = found["perplexity_of_documents"]
    assert low < middle < high


def test_tokens_are_counted_by_parameter(toy, prepare):
    found, printed = prepare()
    parameters = sum(p.numel() for p in AutoModelForMaskedLM.from_pretrained(toy.checkpoint).parameters())
    tokens = int(re.search(r"train\n(?:.*\n)*?  tokens +([\d,]+)", printed)[1].replace(",", ""))
    assert found["tokens_a_parameter"] == tokens / parameters
    assert f"of {parameters:,} parameters" in printed
    few, _ = prepare("--max_train_samples", "5")
    assert few["tokens_a_parameter"] == 5 * 16 / parameters, "those that the run sees"


def test_out_of_domain_text_stands_beside_that_of_the_domain(prepare, tmp_path):
    other = tmp_path / "general.txt"
    other.write_text("the cat ж unlikely catdog\n" * 30)
    found, printed = prepare("--out_of_domain_file", str(other))
    assert found["out_of_domain_pieces_a_word"] > found["pieces_a_word"]
    assert found["out_of_domain_unknown_token_share"] > 0 == found["unknown_token_share"]
    same, _ = prepare("--validation_file", str(other))
    assert found["out_of_domain_perplexity"] == pytest.approx(same["perplexity"]), "both one by one"
    assert f"pieces a word          {found['pieces_a_word']:.4g}, in out-of-domain text" in printed


def test_the_words_that_cost_most_tokens_are_named_in_pieces(toy, prepare, tmp_path):
    text = tmp_path / "domain.txt"
    text.write_text("the catcat likes milk every day .\n" * 40 + "milkmilk owlowlowl .\n" * 30)
    found, printed = prepare("--train_file", str(text), model=False)
    assert "perplexity" not in found, "a tokenizer alone predicts nothing"
    first = found["words_cut_most"][0]
    assert first.replace("##", "").replace(" ", "") in ("owlowlowl", "catcat")
    assert first in printed


def test_what_to_expect_is_what_the_record_says_of_the_run_that_is_most_alike():
    records = json.loads((REPOSITORY / "benchmarks" / "results" / "outlook.json").read_text())["runs"]
    for record in records:
        said = script.expected({key: 1.01 * record[key] for key in ("tokens_a_parameter", "perplexity")})
        assert record["what"] in said
        assert f"{record['gain']:.4g} ({record['gain_interval'][0]:.4g} to {record['gain_interval'][1]:.4g})" in said
        assert ("a classifier of its features gained" in said) == bool(record["classifier"])


@pytest.mark.parametrize(
    "found", [{"tokens_a_parameter": 100.0, "perplexity": 130.0}, {"tokens_a_parameter": 0.1, "perplexity": 1.2}]
)
def test_a_run_unlike_all_that_are_recorded_is_told_nothing(found):
    assert "recorded runs has tokens a parameter and a perplexity like these" in script.expected(found)


def test_without_a_record_or_a_perplexity_nothing_is_expected(monkeypatch, tmp_path):
    assert script.expected({"perplexity": math.nan}) == "there is no recorded run to compare with"
    monkeypatch.setattr(script, "RECORDS", tmp_path / "none.json")
    assert script.expected({"perplexity": 80.0}) == "there is no recorded run to compare with"
