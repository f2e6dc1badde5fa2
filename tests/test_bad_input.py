"""Every mistake ends in one line on standard error and exit status 2, and costs nothing that is on disk."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, EsmTokenizer, PreTrainedTokenizerFast

from mlm.data.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY
from tests.processes import Server, server
from tests.runs import finish
from tests.tokenizers_for_tests import unigram

CHINESE = ["这家酒店的房间很干净服务也很好下次还会再来住", "早餐的种类不多而且味道一般但是位置非常方便"] * 40


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def server_without_network(caches) -> Iterator[Server]:
    """Its processes do not know that they are offline: the Hub is where nobody answers."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    other = Server({**environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    yield other
    other.close()


class Place:
    """A user's folder, with a file and an earlier run in it, from which scripts are started."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        (folder / "earlier").mkdir()
        (folder / "earlier" / "model.safetensors").write_bytes(b"weeks of work")
        run = {"configuration": {"model": {}, "corpus": {}}, "experiment": {}, "environment": {}}
        (folder / "earlier" / "run.json").write_text(json.dumps(run))
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"weeks of work, of another program")
        (folder / "notes.txt").write_text("the old cat likes milk .\n")

    def run(self, script: str, *flags: str, **environment: str) -> Ended:
        argv = [str(REPOSITORY / "scripts" / script), *map(str, flags)]
        return Ended(*finish(self.server.start(argv, folder=self.folder, **environment)))

    def contents(self) -> dict[str, bytes | None]:
        paths = sorted(self.folder.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    def refuses(self, words: list[str], script: str, *flags: str, **environment: str) -> None:
        before = self.contents()
        ended = self.run(script, *flags, **environment)
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert ended.stderr.startswith("error: ")
        for word in words:
            assert word in ended.stderr
        assert ended.status == 2
        assert self.contents() == before


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path, server())


@pytest.fixture
def place_without_network(tmp_path, server_without_network) -> Place:
    return Place(tmp_path, server_without_network)


@pytest.fixture(scope="module")
def bad(toy, tmp_path_factory) -> Path:
    """A folder of everything that can be wrong with a file, a tokenizer or a checkpoint."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n\n")
    (folder / "short.txt").write_text("the old cat\nthe young dog\n")
    (folder / "latin1.txt").write_bytes("the cat\nthe dog\nthe café\n".encode("latin-1"))
    (folder / "columns.csv").write_text("title,review\na,b\nc,d\n")
    (folder / "broken.jsonl").write_text('{"text": "the cat"}\n{"text": "the dog"}\n{"text": "the \n')
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "strange.pdf").write_text("%PDF")
    (folder / "chinese.txt").write_text("\n".join(CHINESE))
    (folder / "folder").mkdir()

    (folder / "unknown_key.yaml").write_text("learning_rat: 1e-3\n")
    (folder / "wrong_type.yaml").write_text("learning_rate: fast\n")
    (folder / "list.yaml").write_text("learning_rate: [1, 2]\n")
    (folder / "syntax.yaml").write_text("learning_rate: 1e-3\n  seed: : 3\n")
    (folder / "words.yaml").write_text("just words\n")

    backend = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(folder / "gpt2")
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "<mask>"]))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "slow")
    unigram(CHINESE, 300).save_pretrained(folder / "unigram")
    larger = load_tokenizer(str(toy.checkpoint))
    larger.add_tokens(["cinematography"])
    toy.new_model(load_tokenizer(str(toy.checkpoint))).save_pretrained(folder / "larger")
    larger.save_pretrained(folder / "larger")
    load_tokenizer(str(toy.checkpoint)).save_pretrained(folder / "damaged")
    config = (toy.checkpoint / "config.json").read_bytes()
    (folder / "damaged" / "config.json").write_bytes(config)
    (folder / "damaged" / "model.safetensors").write_bytes(b"half of it")
    tokenizer = load_tokenizer(str(toy.checkpoint))
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    wrong = {"heads": {"num_attention_heads": 0}, "activation": {"hidden_act": "none"}}
    for name, setting in {**wrong, "layers": {"num_hidden_layers": 10**9}}.items():
        (folder / name).mkdir()
        described = {**json.loads((folder / "other" / "config.json").read_text()), **setting}
        (folder / name / "config.json").write_text(json.dumps(described))
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text("[" * 10**5 + "]" * 10**5)
    (folder / "deep.yaml").write_text("seed: " + "[" * 10**4 + "]" * 10**4)
    (folder / "nul.yaml").write_text('hub_model_id: "a\\0b"\n')
    (folder / "loop").symlink_to("loop")
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')

    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "progress.json").write_text('{"step": 3}')
    return folder


TRAINING = [
    # what is wrong, flags instead of a good run's, what the message says
    ("no such file", {"train_file": "{bad}/none.txt"}, ["{bad}/none.txt: no such file"]),
    ("no such validation file", {"validation_file": "no.txt"}, ["--validation_file no.txt: no such file"]),
    ("an empty file", {"train_file": "{bad}/empty.txt"}, ["{bad}/empty.txt is empty"]),
    ("a file of blanks", {"train_file": "{bad}/blank.txt"}, ["{bad}/blank.txt", "no", "document"]),
    ("a folder as a file", {"train_file": "{bad}/folder"}, ["is not a file", "--dataset_name"]),
    ("a file of another kind", {"train_file": "{bad}/strange.pdf"}, ["strange.pdf", ".txt, .jsonl"]),
    ("a damaged file", {"train_file": "{bad}/cut.parquet"}, ["cut.parquet"]),
    ("less than one chunk", {"train_file": "{bad}/short.txt"}, ["10 tokens", "chunk of 16", "--remainder"]),
    ("no text column", {"train_file": "{bad}/columns.csv"}, ["'text'", "title, review", "--text_column"]),
    ("not UTF-8", {"train_file": "{bad}/latin1.txt"}, ["latin1.txt", "line 3", "UTF-8", "0xe9"]),
    ("a broken JSON line", {"train_file": "{bad}/broken.jsonl"}, ["broken.jsonl", "line 3", "JSON"]),
    ("two corpora", {"dataset_name": "imdb"}, ["--dataset_name imdb", "--train_file", "one of the two"]),
    ("an empty dataset folder", {"train_file": "", "dataset_name": "{bad}/folder"}, ["holds no data files"]),
    ("no mask token", {"tokenizer_name": "{bad}/gpt2"}, ["{bad}/gpt2", "no mask token", "--tokenizer_name"]),
    (
        "a slow tokenizer where words are needed",
        {"tokenizer_name": "{bad}/slow", "whole_word_mask": "true"},
        ["--whole_word_mask", "slow", "--tokenizer_name"],
    ),
    (
        "whole words where the tokenizer sees none",
        {"tokenizer_name": "{bad}/unigram", "train_file": "{bad}/chinese.txt", "whole_word_mask": "true"},
        ["--whole_word_mask", "tokens on average", "at most 10"],
    ),
    ("no tokenizer there", {"tokenizer_name": "{bad}/folder"}, ["tokenizer", "{bad}/folder"]),
    ("no such model folder", {"model_name_or_path": "./nowhere"}, ["no such folder", "./nowhere"]),
    ("damaged weights", {"model_name_or_path": "{bad}/damaged"}, ["{bad}/damaged"]),
    (
        "no masked language model",
        {"model_name_or_path": "{bad}/t5", "tokenizer_name": "{toy}"},
        ["{bad}/t5", "t5 is no masked language model"],
    ),
    ("no such architecture", {"model_name_or_path": "", "model_type": "brt"}, ["--model_type brt", "bert"]),
    ("a probability above 1", {"mlm_probability": "1.5"}, ["--mlm_probability 1.5", "between 0 and 1"]),
    ("a probability below 0", {"mask_replace_prob": "-0.1"}, ["--mask_replace_prob -0.1"]),
    ("a probability that is none", {"mlm_probability": "nan"}, ["--mlm_probability nan"]),
    ("probabilities above 1 together", {"random_replace_prob": "0.3"}, ["0.8", "0.3", "sum to more than 1"]),
    ("all of dropout", {"dropout": "1"}, ["--dropout 1"]),
    ("nothing held out", {"validation_file": "", "validation_split_percentage": 0}, ["percentage 0"]),
    ("a size of zero", {"max_seq_length": "0"}, ["--max_seq_length 0"]),
    ("a negative size", {"train_batch_size": "-8"}, ["--train_batch_size -8"]),
    ("no word of the choice", {"remainder": "keep"}, ["--remainder", "'keep'", "drop|pad"]),
    ("no number", {"learning_rate": "abc"}, ["--learning_rate: 'abc' is not FLOAT"]),
    ("a fraction where a count is due", {"max_train_steps": "1.5"}, ["--max_train_steps: '1.5' is not INT"]),
    ("an unknown flag", {"learning-rate": "1"}, ["--learning-rate", "did you mean --learning_rate?"]),
    ("a flag like no other", {"zzz": "1"}, ["--zzz", "--help"]),
    ("more than the position table", {"max_seq_length": 65}, ["--max_seq_length 65", "takes 64 tokens"]),
    ("an occupied directory", {"output_dir": "earlier"}, ["earlier is not empty", "--overwrite_output_dir"]),
    (
        "overwriting, with a mistake that shows late",
        {"output_dir": "earlier", "overwrite_output_dir": "true", "max_seq_length": 65},
        ["--max_seq_length 65"],
    ),
    ("a file as a directory", {"output_dir": "notes.txt"}, ["--output_dir notes.txt", "file"]),
    ("a directory in a file", {"output_dir": "notes.txt/run"}, ["notes.txt/run", "cannot write"]),
    ("a directory nobody can write", {"output_dir": "/proc/run"}, ["--output_dir /proc/run", "cannot write"]),
    ("a store nobody can write", {"token_store": "/proc/x"}, ["--token_store /proc/x", "cannot write"]),
    ("a file as a store", {"token_store": "notes.txt"}, ["--token_store notes.txt", "cannot write"]),
    (
        "no checkpoint, and a model in the directory",
        {"resume_from_checkpoint": "latest", "output_dir": "model"},
        ["--output_dir model is not empty", "what it holds is no run of this program"],
    ),
    ("no such checkpoint", {"resume_from_checkpoint": "step_9"}, ["--resume_from_checkpoint step_9"]),
    ("half a checkpoint", {"resume_from_checkpoint": "{bad}/checkpoint"}, ["{bad}/checkpoint"]),
    ("fp16 on a CPU", {"mixed_precision": "fp16"}, ["fp16", "GPU", "bf16"]),
    ("no such tracker", {"with_tracking": "true", "report_to": "paper"}, ["paper"]),
    ("no such settings file", {"config": "none.yaml"}, ["--config none.yaml", "No such file"]),
    ("a settings file of words", {"config": "{bad}/words.yaml"}, ["words.yaml", "flag_name: value"]),
    ("broken settings", {"config": "{bad}/syntax.yaml"}, ["syntax.yaml", "line 2"]),
    ("an unknown setting", {"config": "{bad}/unknown_key.yaml"}, ["learning_rat;", "--learning_rate?"]),
    ("a setting of no type", {"config": "{bad}/wrong_type.yaml"}, ["type.yaml: --learning_rate: 'fast'"]),
    ("a list as a setting", {"config": "{bad}/list.yaml"}, ["list.yaml", "learning_rate", "one value"]),
    ("settings nested beyond reason", {"config": "{bad}/deep.yaml"}, ["deep.yaml", "not a YAML file"]),
    ("a NUL in a name", {"config": "{bad}/nul.yaml"}, ["--hub_model_id", "NUL"]),
    ("no heads", {"model_name_or_path": "", "config_name": "{bad}/heads"}, ["{bad}/heads"]),
    ("no heads in a checkpoint", {"model_name_or_path": "{bad}/heads", "tokenizer_name": "{toy}"}, ["{bad}/heads"]),
    ("a billion layers", {"model_name_or_path": "", "config_name": "{bad}/layers"}, ["1,000,000,000 layers"]),
    ("an unknown activation", {"model_name_or_path": "", "config_name": "{bad}/activation"}, ["{bad}/activation"]),
    ("a model nested beyond reason", {"model_name_or_path": "{bad}/deep", "tokenizer_name": "{toy}"}, ["{bad}/deep"]),
    ("a batch of a billion", {"train_batch_size": 10**9}, ["--train_batch_size 1000000000: at most 1,048,576"]),
    (
        "a batch of a billion in parts",
        {"train_batch_size": "none", "gradient_accumulation_steps": 10**6},
        ["--gradient_accumulation_steps", "8,000,000 chunks", "at most 1,048,576"],
    ),
    ("evaluation in batches of a billion", {"per_device_eval_batch_size": 10**9}, ["--per_device_eval_batch_size"]),
    ("10,000 workers", {"preprocessing_num_workers": 10**4}, ["--preprocessing_num_workers 10000: at most 1,024"]),
    ("a billion mask seeds", {"eval_mask_seeds": 10**9}, ["--eval_mask_seeds 1000000000: at most 10,000"]),
    ("a billion folds", {"eval_mask_folds": 10**9}, ["--eval_mask_folds 1000000000: at most 10,000"]),
    ("10^30 steps", {"max_train_steps": 10**30}, ["--max_train_steps", "at most 1,000,000,000"]),
    ("10^30 epochs", {"max_train_steps": "none", "num_train_epochs": "1e30"}, ["--num_train_epochs 1e+30: at most"]),
    (
        "10^8 epochs",
        {"max_train_steps": "none", "num_train_epochs": "1e8", "train_batch_size": 1},
        ["--num_train_epochs 100000000.0", "steps, at most 1,000,000,000"],
    ),
    ("chunks of a billion", {"max_seq_length": 10**9}, ["--max_seq_length 1000000000: at most 1,048,576"]),
    *(
        (f"a {what} as --{flag}", {flag: name}, [words])
        for what, name, words in (("name of 300 bytes", "x" * 300, "xxx"), ("loop of links", "{bad}/loop", "loop"))
        for flag in ("output_dir", "train_file", "token_store", "resume_from_checkpoint", "config", "tokenizer_name")
    ),
    ("a loop of links beside a dataset", {"dataset_name": "{bad}/folder", "output_dir": "{bad}/loop"}, ["loop"]),
    ("a Hub name offline", {"model_name_or_path": "org/none"}, ["org/none", "no network"]),
    ("a dataset offline", {"train_file": "", "dataset_name": "org/none"}, ["org/none", "no network"]),
    ("uploading offline", {"push_to_hub": "true"}, ["--push_to_hub"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), [case[1:] for case in TRAINING], ids=[case[0] for case in TRAINING])
def test_training_refuses(flags, words, place, toy, bad):
    names = {"bad": bad, "toy": toy.checkpoint}
    flags = {"output_dir": place.folder / "run", **flags}
    flags = {name: str(value).format(**names) for name, value in flags.items()}
    words = [word.format(**names) for word in words]
    place.refuses(words, "train.py", *toy.flags(**flags))


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "abc"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "two"},
        {"MASTER_PORT": "http"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_an_environment_that_no_launcher_makes_is_refused(environment, place, toy):
    place.refuses([next(iter(environment))], "train.py", *toy.flags(place.folder / "run"), **environment)


def test_fp16_on_a_cpu_is_refused_from_the_launcher_too(place, toy):
    flags = toy.flags(place.folder / "run")
    place.refuses(["fp16", "bf16"], "train.py", *flags, ACCELERATE_MIXED_PRECISION="fp16")


def test_a_mistake_on_resuming_costs_nothing_of_the_run(place, toy, bad):
    flags = toy.flags(place.folder / "run", max_train_steps=2, checkpointing_steps=1)
    assert place.run("train.py", *flags)[0::2] == (0, "")
    flags.append("--resume_from_checkpoint=latest")
    other = f"--model_name_or_path={bad}/other"
    place.refuses(["step_2", "another experiment, with model "], "train.py", *flags, other)
    place.refuses(["--max_seq_length 65"], "train.py", *flags, "--max_seq_length=65")
    place.refuses(["is not empty"], "train.py", *flags, "--resume_from_checkpoint=none")


OTHERS = [
    ("nothing to measure", "evaluate.py", [], ["--model_name_or_path"]),
    (
        "measuring ids beyond the embeddings",
        "evaluate.py",
        ["--model_name_or_path={toy}", "--tokenizer_name={bad}/larger", "--train_file={text}"],
        ["{toy}", "go up to", "rows"],
    ),
    (
        "measuring under fp16 on a CPU",
        "evaluate.py",
        ["--model_name_or_path={toy}", "--train_file={text}", "--mixed_precision=fp16"],
        ["fp16", "bf16"],
    ),
    (
        "measuring with a GPT's tokenizer",
        "evaluate.py",
        ["--model_name_or_path={toy}", "--tokenizer_name={bad}/gpt2", "--train_file={text}"],
        ["no mask token"],
    ),
    ("no model to fill with", "fill_mask.py", ["a [MASK]"], ["--model_name_or_path"]),
    ("no sentence", "fill_mask.py", ["--model_name_or_path={toy}"], ["no sentence"]),
    ("no mask", "fill_mask.py", ["--model_name_or_path={toy}", "a cat"], ["no mask", "[MASK]"]),
    (
        "filling with ids beyond the embeddings",
        "fill_mask.py",
        ["--model_name_or_path={bad}/larger", "a [MASK]"],
        ["{bad}/larger", "go up to", "rows"],
    ),
    (
        "filling with a Hub name offline",
        "fill_mask.py",
        ["--model_name_or_path=org/none", "a [MASK]"],
        ["org/none", "no network"],
    ),
    ("a corpus that is not there", "prepare.py", ["--train_file=none.txt"], ["none.txt: no such file"]),
    ("a negative number to show", "prepare.py", ["--show=-1"], ["--show -1"]),
    (
        "preparing words where the tokenizer sees none",
        "prepare.py",
        ["--tokenizer_name={bad}/unigram", "--train_file={bad}/chinese.txt", "--whole_word_mask"],
        ["--whole_word_mask", "tokens on average"],
    ),
    (
        "preparing less than one chunk",
        "prepare.py",
        ["--tokenizer_name={toy}", "--train_file={bad}/short.txt"],
        ["tokens", "chunk of 128"],
    ),
]


@pytest.mark.parametrize(("script", "flags", "words"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_the_other_scripts_refuse(script, flags, words, place, toy, bad):
    names = {"bad": bad, "toy": toy.checkpoint, "text": toy.train_file}
    place.refuses([word.format(**names) for word in words], script, *(flag.format(**names) for flag in flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"model_name_or_path": "org/none"},
        {"tokenizer_name": "org/none"},
        {"train_file": "", "dataset_name": "org/none"},
        {"push_to_hub": "true", "hub_model_id": "org/none"},
    ],
    ids=["model", "tokenizer", "dataset", "upload"],
)
def test_without_network_a_name_is_refused(flags, place_without_network, toy):
    flags = toy.flags(place_without_network.folder / "run", **flags)
    place_without_network.refuses(["org/none"], "train.py", *flags)


def test_without_network_a_model_comes_from_the_cache(place_without_network, toy, caches):
    cached = caches / "hf" / "hub" / "models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(toy.checkpoint, cached / "snapshots" / ("0" * 40))
    flags = ["--model_name_or_path", "org/cached", "the old [MASK] likes milk ."]
    ended = place_without_network.run("fill_mask.py", *flags)
    assert (ended.status, ended.stderr) == (0, "")
