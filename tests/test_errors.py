"""Claims about the words for a mistake: one line, of what is wrong and where, however long the error is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.errors import UserError, explain_load_failure, one_line, printable


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("gone\rover \x9b2J", r"gone\rover \x9b2J"),
        ("\u202etxt.exe \u2066 \u2028", r"\u202etxt.exe \u2066 \u2028"),
        ("half a \ud83d pair", r"half a \ud83d pair"),
        ("lines\n\tkept, naïve 漢字 👩‍🔬 שלום \\x1b", "lines\n\tkept, naïve 漢字 👩‍🔬 שלום \\x1b"),
    ],
)
def test_what_a_terminal_obeys_is_shown(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_shown_text_can_be_written_anywhere_and_is_shown_once(text):
    shown = printable(text)
    shown.encode()
    assert printable(shown) == shown
    assert "\x1b" not in shown


def test_a_mistake_shows_the_names_in_it_and_stays_one_line():
    assert str(UserError("no file \x1b]0;title\x07\nb")) == r"no file \x1b]0;title\x07\nb"
    assert str(UserError(UserError("\x1b"))) == r"\x1b"
