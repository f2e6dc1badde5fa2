import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.model.small_models import small_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    small_model("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="mlm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mlm")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
