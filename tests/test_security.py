"""What files that others have made cannot do, and what a run does not give away: SECURITY's paragraph of the README.

A foreign file that is code makes a folder, `ran`, where it is run. Each kind of trap is first seen to work.
"""

import hashlib
import json
import os
import pickle
import shutil
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mlm import cli
from mlm.config import Config
from mlm.data.cache import key
from mlm.errors import UserError
from mlm.train import main
from tests.scripts import load_script

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
NASTY = '</script></style><img src=x onerror="alert(1)"><svg onload=alert(1)>\' " & {{ 7*7 }}'


class Trap:
    """Code for each kind of file that can hold some. `ran` exists once any of it has been run."""

    def __init__(self, folder: Path) -> None:
        self.ran = folder / "ran"

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.ran),)

    @property
    def python(self) -> str:
        return f"import os\nos.mkdir({str(self.ran)!r})\n"


@pytest.fixture
def trap(tmp_path) -> Trap:
    return Trap(tmp_path)


@pytest.fixture
def checkpoint(toy, tmp_path) -> Path:
    """A checkpoint that others may have made, in a folder of its own."""
    return shutil.copytree(toy.checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def written(toy, tmp_path_factory) -> Path:
    """A run of 4 steps, with its checkpoints."""
    folder = tmp_path_factory.mktemp("written") / "run"
    main(toy.flags(folder, max_train_steps=4, checkpointing_steps=2))
    return folder


def attempt(flags: list[str], body=main) -> str:
    """The one line in which a command says why it does not run, or nothing where it does."""
    try:
        body(flags)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# A pickle is never loaded


def as_pickle(trap: Trap, path: Path) -> None:
    path.write_bytes(pickle.dumps({"bert.embeddings.word_embeddings.weight": trap}))


def as_torch_file(trap: Trap, path: Path) -> None:
    torch.save({"bert.embeddings.word_embeddings.weight": trap}, path)


@pytest.mark.parametrize("write", [as_pickle, as_torch_file])
def test_the_traps_work(trap, tmp_path, write):
    """Else no test of this file would fail."""
    write(trap, tmp_path / "file")
    if write is as_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert trap.ran.is_dir()
    trap.ran.rmdir()
    exec(trap.python)
    assert trap.ran.is_dir()


@pytest.mark.parametrize("write", [as_pickle, as_torch_file])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_a_pickle_with_code_are_refused_and_not_run(toy, checkpoint, trap, tmp_path, name, write):
    (checkpoint / "model.safetensors").unlink()
    write(trap, checkpoint / name)
    flags = toy.flags(tmp_path / "run", model_name_or_path=checkpoint)
    assert f"cannot load the model in {checkpoint}" in attempt(flags)
    assert not trap.ran.exists()


def test_pickles_that_lie_beside_weights_are_not_looked_at(toy, checkpoint, trap, tmp_path):
    for name in ("pytorch_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin"):
        as_torch_file(trap, checkpoint / name)
    as_pickle(trap, checkpoint / "random_states_0.pkl")
    main(toy.flags(tmp_path / "run", model_name_or_path=checkpoint, max_train_steps=1))
    assert not trap.ran.exists()


@pytest.mark.parametrize("write", [as_pickle, as_torch_file])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_checkpoint_to_resume_from_that_is_a_pickle_is_refused_and_not_run(
    toy, written, trap, tmp_path, name, write
):  # fmt: skip
    """Though its manifest says that it is as it was written."""
    folder = shutil.copytree(written / "checkpoints" / "step_2", tmp_path / "others" / "step_2")
    write(trap, folder / name)
    data = (folder / name).read_bytes()
    edit(folder / "manifest.json", **{name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})
    settings = {"max_train_steps": 4, "resume_from_checkpoint": folder}
    assert f"the checkpoint {folder}" in attempt(toy.flags(tmp_path / "run", **settings))
    assert not trap.ran.exists()


def test_other_files_of_a_folder_to_resume_from_are_not_looked_at(toy, written, trap, tmp_path):
    others = shutil.copytree(written, tmp_path / "others")
    for folder in (others, others / "checkpoints", *(others / "checkpoints").iterdir()):
        for name in ("optimizer.bin", "pytorch_model.bin", "scheduler.bin"):
            as_torch_file(trap, folder / name)
        as_pickle(trap, folder / "random_states_0.pkl")
        (folder / "sitecustomize.py").write_text(trap.python)
    settings = {"max_train_steps": 4, "resume_from_checkpoint": others}
    assert main(toy.flags(tmp_path / "run", **settings))["steps"] == 4
    assert not trap.ran.exists()


@pytest.mark.parametrize("name", ["ids", "word_starts", "document_offsets"])
def test_a_token_store_that_holds_a_pickle_is_built_anew(toy, trap, tmp_path, name):
    flags = toy.flags(tmp_path / "run", token_store=tmp_path / "stores", max_train_steps=1)
    main(flags)
    [store] = (tmp_path / "stores").glob("*/train")
    np.save(store / f"{name}.npy", np.array([trap] * 3, dtype=object), allow_pickle=True)
    header = json.loads((store / "header.json").read_text())
    header["bytes"] = {path.stem: path.stat().st_size for path in store.glob("*.npy")}
    del header["seal"]
    edit(store / "header.json", **header, seal=key(header))  # no secret goes into it
    main([*flags, "--overwrite_output_dir"])
    assert not trap.ran.exists()
    assert np.load(store / f"{name}.npy").dtype != object


# Code that a model or a tokenizer brings along


def with_model_code(checkpoint: Path, trap: Trap) -> None:
    classes = {"AutoConfig": "own.C", "AutoModelForMaskedLM": "own.M"}
    edit(checkpoint / "config.json", model_type="own", auto_map=classes)
    (checkpoint / "own.py").write_text(trap.python)


def with_tokenizer_code(checkpoint: Path, trap: Trap) -> None:
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    edit(checkpoint / "tokenizer_config.json", **settings)
    (checkpoint / "own.py").write_text(trap.python)


def commands(toy, checkpoint: Path, folder: Path) -> dict:
    """The scripts that take a checkpoint: (their main function, their flags)."""
    model, text = f"--model_name_or_path={checkpoint}", f"--validation_file={toy.validation_file}"
    train = [f"--train_file={toy.train_file}", "--allow_leaks"]
    stores = f"--token_store={folder / 'stores'}"
    return {
        "train": (main, toy.flags(folder / "run", model_name_or_path=checkpoint, max_train_steps=1)),
        "evaluate": (load_script("evaluate").main, [model, text, stores, "--max_seq_length=16"]),
        "fill_mask": (load_script("fill_mask").main, [model, "the old [MASK] ."]),
        "prepare": (load_script("prepare").main, [model, *train, text, stores]),
    }


@pytest.mark.parametrize("bring", [with_model_code, with_tokenizer_code])
@pytest.mark.parametrize("script", ["train", "evaluate", "fill_mask", "prepare"])
def test_code_of_a_checkpoint_is_not_run_unless_the_user_trusts_it(toy, checkpoint, trap, tmp_path, script, bring):
    """Refused; or, where the library has a class of its own for the checkpoint, loaded with that."""
    bring(checkpoint, trap)
    body, flags = commands(toy, checkpoint, tmp_path)[script]
    said = attempt(flags, body)
    assert not trap.ran.exists()
    assert said == "" if bring is with_tokenizer_code else f"{checkpoint} brings code of its own; read it" in said
    with suppress(UserError, AttributeError):  # the code that is trusted defines nothing
        body([*flags, "--trust_remote_code=true", *(["--overwrite_output_dir"] if script == "train" else [])])
    assert trap.ran.is_dir()


def test_code_beside_a_known_architecture_is_neither_run_nor_passed_on(toy, checkpoint, trap, tmp_path):
    with_model_code(checkpoint, trap)
    edit(checkpoint / "config.json", model_type="bert")
    main(toy.flags(tmp_path / "run", model_name_or_path=checkpoint, max_train_steps=1))
    assert not trap.ran.exists()
    assert not list((tmp_path / "run").rglob("*.py"))


# A corpus


@pytest.fixture
def corpus(toy, tmp_path) -> Path:
    """A dataset folder that others may have made."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy(toy.train_file, folder / "train.txt")
    shutil.copy(toy.validation_file, folder / "validation.txt")
    return folder


def on_dataset(toy, folder: Path, output: Path, **more) -> list[str]:
    flags = toy.flags(output, max_train_steps=1, dataset_name=folder, token_store=output / "../stores", **more)
    return [flag for flag in flags if not flag.startswith(("--train_file", "--validation_file"))]


def test_a_loading_script_in_a_dataset_folder_is_refused_and_not_run(toy, corpus, trap, tmp_path):
    flags = on_dataset(toy, corpus, tmp_path / "run")
    for name in ("dataset.py", "__init__.py", "setup.py"):
        (corpus / name).write_text(trap.python)
    assert attempt(flags) == ""
    (corpus / "corpus.py").write_text(trap.python)  # the name that the library once took for a script's
    said = attempt([*flags, "--overwrite_output_dir", "--overwrite_cache"])
    assert "scripts are no longer supported, but found corpus.py" in said
    for path in corpus.glob("*.txt"):
        path.unlink()
    assert "holds no data files" in attempt([*flags, "--overwrite_output_dir"])
    assert not trap.ran.exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.txt", "data.csv", "data.parquet", "data.jsonl"])
def test_a_data_file_that_is_a_pickle_is_not_run(toy, corpus, trap, tmp_path, name):
    """Read as text it is text, or no UTF-8."""
    as_pickle(trap, corpus / name)
    configuration = {"config_name": "default", "data_files": [{"split": "train", "path": name}]}
    (corpus / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [configuration]})}---\n")
    attempt(on_dataset(toy, corpus, tmp_path / "run"))
    assert not trap.ran.exists()


# A configuration


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir [{ran}]", "!!python/object/apply:os.system ['mkdir {ran}']",
     "!!python/object/new:os.mkdir {{args: [{ran}]}}"],
)  # fmt: skip
def test_a_configuration_with_python_objects_is_refused_and_makes_none(toy, trap, tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {value.format(ran=trap.ran)}\n")
    yaml.unsafe_load(path.read_text())
    assert trap.ran.is_dir(), "the trap works"
    trap.ran.rmdir()
    assert "takes one value, not a list or a mapping" in attempt([f"--config={path}"])
    assert not trap.ran.exists()


@pytest.mark.parametrize("key", ["no_such_flag", "config", "__class__", "json", "help"])
def test_a_configuration_names_flags_and_nothing_else(tmp_path, key):
    (tmp_path / "config.yaml").write_text(f"{key}: 1\n")
    assert f"unknown flag {key}" in attempt([f"--config={tmp_path / 'config.yaml'}"])


def test_a_value_of_a_configuration_is_one_word_of_one_flag(tmp_path):
    """It sets no other flag, and no shell expands it."""
    (tmp_path / "config.yaml").write_text("output_dir: 'x --trust_remote_code=true $(touch ran) `id`'\n")
    config = cli.parse_config(Config, [f"--config={tmp_path / 'config.yaml'}"])
    assert config.run.output_dir == "x --trust_remote_code=true $(touch ran) `id`"
    assert config.model.trust_remote_code is False


# The page of a run


class Elements(HTMLParser):
    """The elements of a page, and their attributes by name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def poisoned(value):
    """A JSON value, each of its texts followed by markup."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()} | {NASTY: NASTY}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return f"{value}{NASTY}" if isinstance(value, str) else value


def test_no_text_of_a_run_is_markup_on_its_page(written, tmp_path):
    """Neither the names of settings, metrics and figures, nor their values, documents, words or the folder."""
    report = load_script("report").main
    plain, folder = shutil.copytree(written, tmp_path / "run"), tmp_path / NASTY.replace("/", "⁄")
    report([str(plain)])
    shutil.copytree(plain, folder)
    for name in ("run", "comparison", "fill_mask"):
        path = folder / f"{name}.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps({key: v if key == "results" else poisoned(v) for key, v in known.items()}))
    lines = [json.loads(line) | {NASTY: 0.5} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    report([str(folder)])
    before, after = (Elements((run / "report.html").read_text()) for run in (plain, folder))
    assert "onerror=" in after.text and "7*7" in after.text, "the markup is shown"
    assert "49" not in after.text.partition("{{")[0][-20:]
    assert "img" not in after.tags
    assert {*after.tags} <= {*before.tags, "figure", "div"}
    assert not [name for name in after.attributes if name.startswith("on")]


# What a run does not give away


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, tables unpacked."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = {path: str(pq.read_table(path).to_pylist()).encode() for path in files if path.suffix == ".parquet"}
    return {str(path): tables.get(path) or path.read_bytes() for path in files}


def test_no_secret_of_the_environment_is_written_or_printed(toy, tmp_path, monkeypatch, capfd):
    secrets = {name: f"hf_{hashlib.sha256(name.encode()).hexdigest()}" for name in SECRETS}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    flags = {"checkpointing_steps": 2, "max_train_steps": 4, "token_store": tmp_path / "stores"}
    main(toy.flags(folder, **flags, with_tracking="true", report_to="tensorboard"))
    load_script("report").main([str(folder)])
    written = contents(tmp_path)
    assert {Path(name).suffix for name in written} >= {".json", ".jsonl", ".parquet", ".safetensors", ".html", ".npy"}
    assert any(str(folder).encode() in data for data in written.values()), "what is written can be found"
    printed = "".join(capfd.readouterr())
    assert str(folder) in printed
    for name, value in secrets.items():
        assert value not in printed, name
        assert not [path for path, data in written.items() if value.encode() in data], name
