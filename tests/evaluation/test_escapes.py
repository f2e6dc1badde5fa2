"""What a terminal would obey, in the names of texts and in tokens, is shown by a comparison and not sent."""

import shutil

from mlm.evaluation.compare import in_words
from tests.scripts import load_script


def test_escapes_in_the_names_of_texts_are_shown_and_not_sent(toy, tmp_path, capsys):
    text = shutil.copy(toy.validation_file, tmp_path / "\x1b[31mred.txt")
    flags = [f"--model_name_or_path={toy.checkpoint}", f"--validation_file={text}", "--max_seq_length=16"]
    flags.append(f"--token_store={tmp_path / 'stores'}")
    for more in ([], [f"--compare={toy.checkpoint}"]):
        load_script("evaluate").main(flags + more)
        printed = capsys.readouterr().out
        assert "\\x1b[31mred.txt" in printed
        assert "\x1b" not in printed


def test_escapes_in_the_tokens_that_carry_a_gain_are_shown_and_not_sent():
    line = in_words({
        "before": {"perplexity": 4.0},
        "after": {"perplexity": 2.0, "perplexity_by_seed": [2.0]},
        "gain": {"value": 2.0, "interval": [1.5, 2.5]},
        "interval": {"unit": "documents", "units": 9},
        "concentration": {"types": ["\x1b[2J"], "share": 0.9, "gain_without": 1.0},
        "one_by_one": None,
    })  # fmt: skip
    assert "(\\x1b[2J)" in line
    assert "\x1b" not in line
