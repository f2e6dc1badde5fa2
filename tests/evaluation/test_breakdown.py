"""The words of measured tokens are found where these stand; a text of any length costs no more."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlm.evaluation.breakdown import word_spans


def slow_span(word_starts, place):
    """Where the word of a token begins and ends."""
    begin, end = place, place + 1
    while not word_starts[begin]:
        begin -= 1
    while end < len(word_starts) and not word_starts[end]:
        end += 1
    return begin, end


def test_words_to_check_by_eye():
    #                       the   film   ##s    's   good  ##ness
    word_starts = np.array([  1,     1,    0,    1,     1,     0], bool)  # fmt: skip
    begins, ends, word = word_spans(word_starts, np.array([5, 1, 0, 2]))
    assert begins.tolist() == [0, 1, 4]
    assert ends.tolist() == [1, 3, 6]
    assert word.tolist() == [2, 1, 0, 1]


@given(st.lists(st.booleans(), max_size=40), st.lists(st.integers(0, 40), max_size=20))
def test_words_are_those_of_a_slow_search(starts, places):
    word_starts = np.array([True, *starts])
    places = np.array(places, np.int64) % len(word_starts)
    begins, ends, word = word_spans(word_starts, places)
    assert list(zip(begins[word], ends[word], strict=True)) == [slow_span(word_starts, place) for place in places]
    assert len(set(begins.tolist())) == len(begins) == len(np.unique(word)), "each word once"


def test_a_text_of_a_billion_words_takes_no_more_memory_than_its_measured_tokens():
    word_starts = np.broadcast_to(np.True_, 10**9)
    places = np.arange(0, 10**9, 10**6)
    tracemalloc.start()
    begins, _, _ = word_spans(word_starts, places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(begins) == 1000
    assert peak < 200_000


class Counted:
    """Word starts that count how many of them are read."""

    def __init__(self, word_starts):
        self.word_starts, self.read = word_starts, 0

    def __len__(self):
        return len(self.word_starts)

    def __getitem__(self, index):
        self.read += len(index)
        return self.word_starts[index]


def test_a_long_word_is_read_once_not_once_for_each_of_its_tokens():
    counted = Counted(np.arange(10_000) == 0)
    begins, ends, _ = word_spans(counted, np.arange(0, 10_000, 3))
    assert (begins.tolist(), ends.tolist()) == ([0], [10_000])
    assert counted.read <= 2 * 10_000
