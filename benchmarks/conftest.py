"""The text that the benchmarks work on, and where their results go.

    python -m pytest benchmarks --benchmark-disable          checks every implementation's results, in seconds
    python -m pytest benchmarks --imdb FOLDER --model_name_or_path CHECKPOINT --results FOLDER
                                                             measures, on reviews and their tokenizer

The first FOLDER holds train.parquet with a column `text`, whose markup is left out (reviews.py); without it,
the text is made up and there is little of it. The second FOLDER gets a JSON file for each file of benchmarks,
test_data_path.py's in data_path.json.
"""

import os
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.compare import compare
from benchmarks.reviews import read
from mlm.data.token_store import TokenStore
from mlm.data.tokenizer import TokenizerInfo, load_tokenizer, tokenizer_info
from mlm.files import write_json
from mlm.report.environment import environment
from tests.data.stores import build
from tests.tokenizers_for_tests import wordpiece

REVIEWS, MADE_UP = 4000, 1200
SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


def pytest_addoption(parser):
    parser.addoption("--imdb", type=Path, help="folder of train.parquet")
    parser.addoption("--model_name_or_path", help="checkpoint whose tokenizer is used")
    parser.addoption("--results", type=Path, help="folder to write what was measured to, as JSON")


class Corpus(NamedTuple):
    """Documents, and what both sides need to begin."""

    name: str
    texts: list[str]
    dataset: datasets.Dataset  # the same texts, read from a parquet file
    tokenizer: PreTrainedTokenizerBase
    info: TokenizerInfo
    store: TokenStore
    long: int  # tokens in a long chunk

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(len(text.encode()) for text in self.texts)


@pytest.fixture(scope="session")
def corpus(request, tmp_path_factory) -> Corpus:
    temporary = tmp_path_factory.mktemp("corpus")
    folder, checkpoint = (request.config.getoption(name) for name in ("--imdb", "--model_name_or_path"))
    if (folder is None) != (checkpoint is None):
        raise pytest.UsageError("--imdb and --model_name_or_path go together")
    rng = random.Random(0)
    if folder is None:
        texts = [" ".join(_word(rng) for _ in range(rng.randint(5, 40))) for _ in range(MADE_UP)]
        tokenizer, name, long = wordpiece(texts, 300), f"{MADE_UP:,} made-up documents", 1024
    else:
        texts = rng.sample(read(folder / "train.parquet"), REVIEWS)
        tokenizer, name, long = load_tokenizer(checkpoint), f"{REVIEWS:,} IMDb reviews without markup", 8192
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.disable_caching()  # every round does the work again
    datasets.Dataset.from_dict({"text": texts}).to_parquet(temporary / "texts.parquet")
    dataset = datasets.load_dataset(
        "parquet", data_files=str(temporary / "texts.parquet"), split="train", cache_dir=str(temporary / "cache")
    )
    info = tokenizer_info(tokenizer)
    store = build(texts, tokenizer, info, temporary / "store", {"split": "train"})
    return Corpus(name, texts, dataset, tokenizer, info, store, long)


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) + rng.choice(["", "", "", ",", "."])


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the life of a process: each benchmark chooses anew."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def where() -> dict[str, Any]:
    """The machine and the versions, the commit as it is before results are written into it."""
    about = environment(Accelerator(cpu=True))
    AcceleratorState._reset_state()  # the first benchmark may be of bf16
    return about


@pytest.fixture(scope="module")
def results(request, where):
    """The rows of this file's benchmarks; written where --results says when all have been measured."""
    rows, load = [], os.getloadavg()[0]  # processes that wanted a core when it began
    yield rows
    if folder := request.config.getoption("--results"):
        what = request.module.__doc__.splitlines()[0]
        folder.mkdir(parents=True, exist_ok=True)
        name = request.module.__name__.rpartition("test_")[2]
        stored = {"what": what, "rows": rows, "environment": {**where, "load_before": load}}
        write_json(folder / f"{name}.json", stored)


@pytest.fixture
def versus(benchmark, results):
    """compare() for the benchmark at hand."""
    return partial(compare, benchmark, results)
