"""Whose files are in a run directory: a run's own may be replaced when asked, everything else stays."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from transformers import AutoTokenizer

from mlm.engine.checkpoint import CheckpointConfig
from mlm.errors import UserError
from mlm.report.run_directory import RunConfig, RunDirectory
from mlm.train import train

USERS = {
    "documents.parquet": "the corpus",
    "README.md": "notes",
    "metrics.jsonl": "{}",
    "all_results.json": "{}",
    "model.safetensors": "weeks of work",
    "checkpoints/best_model/model.safetensors": "more of it",
    "checkpoints/step_5/model.safetensors": "and more",
    "mlm/events.out.tfevents.1": "curves",
}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("run_json", [None, '{"name": "mine"}', "[]", '{"configuration": 1, "experiment": {}}', "{"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"resume_from_checkpoint": "latest"},
        {"overwrite_output_dir": True},
        {"resume_from_checkpoint": "latest", "overwrite_output_dir": True},
    ],
    ids=str,
)
def test_a_folder_that_holds_no_run_is_never_touched(toy, tmp_path, run_json, flags):
    fill(tmp_path / "folder", USERS | ({} if run_json is None else {"run.json": run_json}))
    before = contents(tmp_path / "folder")
    with pytest.raises(UserError, match="is not empty, and what it holds is no run") as refused:
        train(toy.config(tmp_path / "folder", max_train_steps=1, **flags))
    assert "--overwrite_output_dir" not in str(refused.value), "it would not help"
    assert contents(tmp_path / "folder") == before


def test_overwriting_removes_all_that_a_run_writes_and_nothing_else(toy, tmp_path, monkeypatch):
    """Among it a file that another version's tokenizer has written, by which this one's would have another mask."""
    folder = tmp_path / "run"
    config = toy.config(folder, max_train_steps=2, checkpointing_steps=1)
    train(config)
    about = json.loads((folder / "run.json").read_text())
    about["files"] += ["bpe.codes", "../outside.txt", "notes"]
    stale = {"special_tokens_map.json": '{"mask_token": "cat"}', "added_tokens.json": '{"[X]": 9999}', "vocab.txt": ""}
    stale |= {
        "model-00001-of-00002.safetensors": "",
        "bpe.codes": "",
        "report.html": "",
        "fill_mask.json": "{}",
        "checkpoints/step_7.old.partial/x": "",
        "model.partial/model.safetensors": "",
        "documents.parquet.partial": "",
        "fill_mask.json.partial": "",
    }
    mine = {
        "corpus.txt": "x" * 10**6,
        "notes/a.txt": "a",
        "notes.txt": "b",
        "checkpoints/best_model/weights": "c",
        "mine.partial": "d",
    }
    mine |= {"checkpoints/of mine.partial/x": "e", "checkpoints/step_x/y": "f", "model-of-mine.safetensors": "h"}
    fill(folder, stale | mine)
    fill(tmp_path, {"outside.txt": "g", "run/run.json": json.dumps(about)})
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**9))
    directory = RunDirectory(RunConfig(str(folder), overwrite_output_dir=True), None, Accelerator(cpu=True))
    once = ["model.safetensors", "checkpoints/step_1/model.safetensors"]  # the first is that of step 2 too
    once += [f"checkpoints/step_{step}/state.safetensors" for step in (1, 2)]
    large = sum((folder / name).stat().st_blocks * 512 for name in once)
    assert large <= directory.room(None) - 10**9 < large + 150_000, "the rest is small, and files of mine stay"

    train(toy.config(folder, max_train_steps=2, overwrite_output_dir=True))
    left = contents(folder)
    assert not left.keys() & stale.keys()
    assert {name: left[name].decode() for name in mine} == mine
    assert (tmp_path / "outside.txt").exists()
    written = {"run.json", "metrics.jsonl", "all_results.json", "comparison.json", "documents.parquet", "README.md"}
    written |= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert left.keys() - mine.keys() == written
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"


def test_whoever_may_read_the_configuration_may_read_the_weights(toy, tmp_path):
    train(toy.config(tmp_path / "run", max_train_steps=1, eval_on_start=False))
    names = ("config.json", "model.safetensors", "tokenizer.json", "all_results.json")
    assert len({(tmp_path / "run" / name).stat().st_mode for name in names}) == 1


def test_a_model_of_a_resumed_run_is_not_read_with_files_of_another(toy, tmp_path):
    folder = tmp_path / "run"
    config = toy.config(folder, max_train_steps=2, checkpointing_steps=1)
    train(config)
    (folder / "all_results.json").unlink()
    fill(folder, {"special_tokens_map.json": '{"mask_token": "cat"}', "chat_template.jinja": "x"})
    train(dataclasses.replace(config, checkpoint=CheckpointConfig(1, resume_from_checkpoint="latest")))
    assert not contents(folder).keys() & {"special_tokens_map.json", "chat_template.jinja"}
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"


def test_a_run_that_was_killed_as_it_began_is_in_nobodys_way(toy, tmp_path):
    fill(tmp_path / "run", {".lock": "", "run.json.partial": "{"})
    assert train(toy.config(tmp_path / "run", max_train_steps=1)).results["steps"] == 1


def test_an_upload_takes_no_link_and_no_name_that_only_run_json_vouches_for(tmp_path):
    about = {"configuration": {"model": {}, "corpus": {}}, "experiment": {}, "environment": {}}
    about["files"] = ["config.json", "own.py", ".env", "id_rsa", "model.safetensors"]
    fill(tmp_path, {name: "" for name in about["files"]} | {"run.json": json.dumps(about), "vocab.txt": ""})
    directory = RunDirectory(RunConfig(str(tmp_path)), "latest", Accelerator(cpu=True))
    names = [path.name for path in directory.published(code=False)]
    assert names == ["config.json", "model.safetensors"]
    assert {path.name for path in directory.published(code=True)} == {*names, "own.py"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / ".env")
    with pytest.raises(UserError, match=r"model.safetensors is a link"):
        directory.published(code=False)


def killed_at(call):
    """Path.unlink, for a process that is killed instead of its so manieth call."""
    unlink, calls = Path.unlink, iter(range(1, call))

    def remove(path, **settings):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        unlink(path, **settings)

    return remove


@pytest.mark.parametrize("call", [2, 5, 6, 8, 10])
def test_a_kill_while_overwriting_leaves_what_is_known_for_a_run(toy, tmp_path, monkeypatch, call):
    train(toy.config(tmp_path / "run", max_train_steps=1, checkpointing_steps=1))
    overwrites = toy.config(tmp_path / "run", max_train_steps=1, overwrite_output_dir=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed_at(call))
        train(overwrites)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["experiment"]
    assert not (tmp_path / "run" / "all_results.json").exists()
    train(overwrites)
