"""A toy world for the tests that train: sentences with something to learn, few words, a tiny BERT."""

import dataclasses
import os
import random
import signal
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging as transformers_logging

from mlm.config import Config
from mlm.files import write_json
from mlm.report.environment import environment
from tests.tokenizers_for_tests import wordpiece

ANIMALS = {"cat": "milk", "dog": "bones", "cow": "grass", "bee": "honey", "fox": "grapes", "owl": "mice"}
REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# One thread, here and in the processes that tests start: sums have one order in both, and toys are as fast.
# On the CPU, also where there is a GPU, so that the same bits are compared everywhere; tests marked cuda are the
# GPU's own. The libraries' progress bars would bury a failure.
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite that was started with nohup ignores it, as would what it starts
hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes is no claim
hypothesis.settings.load_profile("any machine")
os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
# Programs that tests start import helpers from here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Nothing is read from or written to the user's caches, by this process or by those that it starts."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(autouse=True)
def fresh_accelerator(request, monkeypatch):
    """accelerate keeps its device and precision for the life of a process, and torch its threads: each test chooses
    anew."""
    if request.node.get_closest_marker("cuda"):
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)  # make_accelerator may have taken all cores: sums of another order in the next test


def pytest_addoption(parser):
    parser.addoption("--faults", type=Path, help="JSON file to write what the tests of faults tried to")


@pytest.fixture(scope="session")
def faults(request):
    """What the tests of faults have tried: {fault: {cases, outcome, test}}, for the README's table."""
    tried = {}
    yield tried
    if path := request.config.getoption("--faults"):
        write_json(path, {"faults": tried, "environment": environment(Accelerator(cpu=True))})


@pytest.fixture
def tally(faults, request):
    """tally(fault, cases, outcome): said by a test whose claims have held for so many cases of a fault."""

    def tell(fault: str, cases: int, outcome: str) -> None:
        tried = faults.setdefault(fault, {"cases": 0, "test": request.node.originalname})
        tried["cases"] += cases
        tried["outcome"] = outcome

    return tell


class Toy:
    """<folder>/train.txt, validation.txt and checkpoint/: what a run needs, and no more."""

    def __init__(self, folder: Path) -> None:
        self.train_file, self.validation_file = folder / "train.txt", folder / "validation.txt"
        self.checkpoint = folder / "checkpoint"
        rng = random.Random(0)
        for path, count in ((self.train_file, 400), (self.validation_file, 60)):
            path.write_text("".join(f"{self.sentence(rng)}\n" for _ in range(count)))
        tokenizer = wordpiece(self.train_file.read_text().splitlines(), 200)
        tokenizer.save_pretrained(self.checkpoint)
        self.new_model(tokenizer).save_pretrained(self.checkpoint)

    @staticmethod
    def sentence(rng: random.Random) -> str:
        animal = rng.choice(sorted(ANIMALS))
        return f"the {rng.choice(['old', 'young', 'small'])} {animal} likes {ANIMALS[animal]} every day ."

    @staticmethod
    def new_model(tokenizer) -> BertForMaskedLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BertForMaskedLM(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=64,
                    max_position_embeddings=64,
                    initializer_range=0.1,  # so small a model learns little from 0.02
                )
            )

    def config(self, output_dir: Path | None = None, *, dropout=0.0, chunks=None, modules=None, **settings) -> Config:
        """A run over the toy world: chunks of 16 tokens, 12 steps of 8 chunks unless told otherwise."""
        settings = {
            "model_name_or_path": str(self.checkpoint),
            "dropout": dropout,
            "train_file": str(self.train_file),
            "validation_file": str(self.validation_file),
            "allow_leaks": True,  # there are few sentences, and each stands in both splits
            "token_store": str(self.checkpoint.parent / "stores"),
            "max_seq_length": 16,
            "max_train_steps": 12,
            "train_batch_size": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "output_dir": output_dir and str(output_dir),
            **settings,
        }
        modules = {**(modules or {}), **({} if chunks is None else {"chunks": chunks})}
        return dataclasses.replace(Config.of(**settings), **modules)

    def flags(self, output_dir: Path, **more) -> list[str]:
        """The command line of `config`."""
        flags = {
            "model_name_or_path": self.checkpoint,
            "dropout": 0,
            "train_file": self.train_file,
            "validation_file": self.validation_file,
            "allow_leaks": True,
            "token_store": self.checkpoint.parent / "stores",
            "max_seq_length": 16,
            "max_train_steps": 12,
            "train_batch_size": 8,
            "learning_rate": 5e-3,
            "output_dir": output_dir,
            **more,
        }
        return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))
