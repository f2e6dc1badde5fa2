"""The run directory on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from mlm.errors import UserError, one_line


def create_repository(name: str) -> str:
    """Returns the repository's full name. Raises UserError where it cannot be made."""
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the login, of the name
        raise UserError(
            f"--push_to_hub: cannot create {name} there; log in with `hf auth login` ({one_line(error, 200)})"
        ) from None


def upload(folder: Path, name: str) -> None:
    """Uploads a run directory but for its checkpoints. Raises UserError where that fails."""
    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["checkpoints/**", ".lock"])
    except Exception as error:  # the model is safe on disk, whatever the Hub or the network says
        raise UserError(f"--push_to_hub: {folder} is whole, its upload failed: {one_line(error)}") from None
