"""Claims about the words for a mistake: one line, of what is wrong and where, however long the error is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.errors import explain_load_failure, one_line


@given(st.text(), st.integers(1, 40))
def test_one_line_is_the_text_up_to_its_width(text, width):
    line = one_line(ValueError(text), width)
    whole = " ".join(text.split())
    assert len(line.splitlines()) <= 1
    assert line == whole if len(whole) <= width else line == f"{whole[: width - 1]}…"


def test_of_a_long_path_the_beginning_is_kept():
    assert one_line("/data/" + "x" * 400, 10) == "/data/xxx…"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}", "cannot load the model in {folder}: OSError: no weights here"),
        ("{folder}/none", "no such folder: {folder}/none (where a model was to be loaded from)"),
        ("./none", "no such folder: ./none (where a model was to be loaded from)"),
        ("org/none", "cannot load the model org/none: there is no such local folder, and from the Hub"),
    ],
    ids=["a folder", "no folder", "a relative path", "a Hub name"],
)
def test_what_failed_to_load_is_named_with_where(name, words, tmp_path):
    error = explain_load_failure("model", name.format(folder=tmp_path), OSError("no weights\nhere"))
    assert str(error).startswith(words.format(folder=tmp_path))


def test_code_to_be_trusted_is_told_from_other_failures_however_late_the_library_says_so(tmp_path):
    error = explain_load_failure("model", str(tmp_path), ValueError("x " * 400 + "pass `trust_remote_code=True`"))
    assert str(error) == f"{tmp_path} brings code of its own; read it, then run it with --trust_remote_code true"
