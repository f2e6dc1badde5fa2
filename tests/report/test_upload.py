"""What --push_to_hub sends, to an HTTP server on this machine that speaks the Hub's language."""

import json
import os
import shutil

import pytest

from mlm.train import train
from tests.processes import Server
from tests.report.hub_server import Hub
from tests.runs import SCRIPT, finish

ALLOWED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ALLOWED |= {"README.md", "all_results.json"}
SECRETS = {".env": "KEY=1", "id_rsa": "a key", "corpus.txt": "ours", "model-of-mine.safetensors": "ours", "a.py": "1"}


@pytest.fixture(scope="module")
def hub_and_server(caches):
    """A Hub, and a server of processes that take it for the Hub."""
    with Hub() as hub:
        server = Server({**os.environ, **hub.environment})
        yield hub, server
        server.close()


@pytest.fixture
def hub(hub_and_server):
    hub_and_server[0].forget()
    return hub_and_server[0]


@pytest.fixture
def push(hub_and_server):
    """Exit status, standard output and standard error of a run that is to be uploaded."""
    start = hub_and_server[1].start
    return lambda flags, **environment: finish(start([SCRIPT, *flags, "--push_to_hub"], **environment))


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """A run that has finished, of a base whose files name a path of the machine that it was made on."""
    folder = tmp_path_factory.mktemp("runs")
    base = folder / "base"
    shutil.copytree(toy.checkpoint, base)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        paths = {"_name_or_path": "/home/me/secret", "name_or_path": "/home/me/secret"}
        if name == "config.json":  # in the other, older releases of transformers look for it
            paths["tokenizer_file"] = "/home/me/secret/t.json"
        (base / name).write_text(json.dumps(settings | paths))
    flags = {"model_name_or_path": base, "max_train_steps": 2}
    train(toy.config(folder / "adapted", **{**flags, "model_name_or_path": str(base)}))
    return folder / "adapted", toy.flags(folder / "adapted", **flags)


def copied(finished, tmp_path):
    """A copy of the finished run, with files of other people in it, and the flags to upload it."""
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "adapted")
    for name, text in SECRETS.items():
        (tmp_path / "adapted" / name).write_text(text)
    flags = [flag for flag in flags if "output_dir" not in flag]
    return [*flags, f"--output_dir={tmp_path / 'adapted'}", "--resume_from_checkpoint=latest"]


def test_an_upload_takes_the_model_the_card_and_the_results_and_nothing_else(toy, finished, hub, push, tmp_path):
    status, output, errors = push(copied(finished, tmp_path))
    assert (status, errors) == (0, "")
    repository = hub.repositories["me/adapted"]
    assert repository["private"]
    assert repository["files"].keys() == ALLOWED
    for name, content in repository["files"].items():
        assert content == (tmp_path / "adapted" / name).read_bytes()
        assert str(toy.checkpoint.parent).encode() not in content
        assert b"/home/" not in content, name
    sent = b"".join(repository["files"].values()).decode(errors="replace")
    assert not [line for line in toy.validation_file.read_text().splitlines() if line in sent]
    assert any(request.startswith("PUT /large/") for request in hub.requests)
    [line] = [line for line in output.splitlines() if line.startswith("uploading ")]
    assert set(line.replace(",", " ").split()) >= ALLOWED
    assert f" to me/adapted, private, on {hub.endpoint}" in line


def test_a_run_is_created_before_its_first_step_and_uploaded_after_its_last(toy, hub, push, tmp_path):
    flags = toy.flags(tmp_path / "run", max_train_steps=2, hub_model_id="org/other", hub_private_repo="false")
    status, output, errors = push(flags)
    assert (status, errors) == (0, "")
    assert not hub.repositories["org/other"]["private"]
    assert hub.repositories["org/other"]["files"].keys() == ALLOWED
    assert output.index("uploading ") > output.index("step 2/2")
    assert " to org/other, public, on " in output


def test_a_refused_token_is_one_line_before_anything_is_written(toy, hub, push, tmp_path):
    status, _, errors = push(toy.flags(tmp_path / "run", max_train_steps=2), HF_TOKEN="hf_bad")
    assert status == 2
    assert "--push_to_hub: cannot create run" in errors
    assert "hf auth login" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_repository_that_everyone_can_read_takes_nothing_unasked(finished, hub, push, tmp_path):
    hub.create({"name": "adapted", "private": False})
    flags = copied(finished, tmp_path)
    status, _, errors = push(flags)
    assert status == 2
    assert "me/adapted is there already, and everyone can read it; give --hub_private_repo false" in errors
    assert not hub.repositories["me/adapted"]["files"]
    assert push([*flags, "--hub_private_repo=false"])[0] == 0
    assert hub.repositories["me/adapted"]["files"].keys() == ALLOWED


def test_an_upload_that_is_cut_in_its_middle_is_tried_again(finished, hub, push, tmp_path):
    hub.cut = 1
    hub.create({"name": "adapted", "private": True})
    status, output, errors = push([*copied(finished, tmp_path), "--hub_private_repo=false"])
    assert (status, errors) == (0, "")
    assert " to me/adapted, private, on " in output, "as it is, whatever the flag says"
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    written = hub.repositories["me/adapted"]["files"]["model.safetensors"]
    assert written == (tmp_path / "adapted" / "model.safetensors").read_bytes()


def test_an_upload_that_failed_is_made_up_for_by_the_same_command(finished, hub, push, tmp_path):
    flags = copied(finished, tmp_path)
    hub.refuse_commits = True
    status, _, errors = push(flags)
    assert status == 2
    assert "is whole, its upload failed" in errors
    assert "--resume_from_checkpoint latest" in errors
    assert len(errors.splitlines()) == 1
    assert not hub.repositories["me/adapted"]["files"], "all files or none"
    hub.refuse_commits = False
    assert push(flags)[0] == 0
    assert hub.repositories["me/adapted"]["files"].keys() == ALLOWED
