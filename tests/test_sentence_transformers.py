"""An adapted model as an embedding model: what the README shows, with the package in a folder of its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlm.data.task import Task
from mlm.evaluation.probe import features
from mlm.train import train

VERSION = "6.2.0"
EMBED = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
embeddings = model.encode(json.loads(sys.argv[2]))
model.save(sys.argv[3])
again = SentenceTransformer(sys.argv[3]).encode(json.loads(sys.argv[2]))
print(json.dumps([embeddings.tolist(), again.tolist()]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """sentence-transformers alone; all that it needs is here. Skips where it cannot be had."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    try:
        done = subprocess.run(
            [*command, f"sentence-transformers=={VERSION}"], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("sentence-transformers could not be downloaded within two minutes")
    if done.returncode:
        pytest.skip(f"sentence-transformers could not be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.torture
def test_an_adapted_model_is_a_sentence_transformer_by_its_name_alone(toy, package, tmp_path):
    """With the mean over tokens that the search task measures, and without anything of this project."""
    train(toy.config(tmp_path / "run", max_train_steps=3))
    texts = ["the old cat likes milk", "a dog ."]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", EMBED, str(tmp_path / "run"), json.dumps(texts), str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    embeddings, again = map(np.array, json.loads(done.stdout.splitlines()[-1]))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    task = Task("task", [(text,) for text in texts], None)
    expected = features(model, tokenizer, task, 2, Accelerator(cpu=True))[:, :32]
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, embeddings, rtol=1e-5, atol=1e-6)
