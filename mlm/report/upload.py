"""A run on the Hub: the model, its card and its results, and nothing else that lies in its directory."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from mlm.errors import UserError, one_line


def create_repository(name: str, private: bool) -> tuple[str, bool]:
    """Returns the repository's full name, and whether it is private. Raises UserError where it cannot be made, or is
    public and must not be."""
    api = HfApi()
    try:
        full_name = api.create_repo(name, private=private, exist_ok=True).repo_id
        is_private = api.model_info(full_name).private is not False
    except Exception as error:  # of the network, of the login, of the name
        advice = "log in with `hf auth login`"
        raise UserError(f"--push_to_hub: cannot create {name} there; {advice} ({one_line(error, 200)})") from None
    if private and not is_private:
        advice = "give --hub_private_repo false to upload to it, or another --hub_model_id"
        raise UserError(f"--push_to_hub: {full_name} is there already, and everyone can read it; {advice}")
    return full_name, is_private


def announcement(files: Sequence[Path], name: str, private: bool) -> str:
    """What is about to go where, in one line."""
    size = sum(path.stat().st_size for path in files) / 1e6
    kind = "private" if private else "public"
    return f"uploading {', '.join(p.name for p in files)} ({size:,.1f} MB) to {name}, {kind}, on {HfApi().endpoint}"


def upload(files: Sequence[Path], name: str) -> None:
    """Uploads files in one commit, all or none. The library retries what the network cuts off. Raises UserError."""
    operations = [CommitOperationAdd(path.name, path) for path in files]
    try:
        HfApi().create_commit(name, operations, commit_message="Upload of a training run")
    except Exception as error:  # the model is safe on disk, whatever the Hub or the network says
        again = "the same command with --resume_from_checkpoint latest tries it again"
        folder, reason = files[0].parent, one_line(error, 200)
        raise UserError(f"--push_to_hub: {folder} is whole, its upload failed ({reason}); {again}") from None
