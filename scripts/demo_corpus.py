"""The demo's text: the language reference and the docstrings of the Python that runs it, as a file to train on.

Read from source and never imported: some of those modules act on import.
"""

import ast
import json
import os
import sys
import sysconfig
import warnings
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path

from mlm.config import Config
from mlm.data.cache import build_once, key
from mlm.data.token_store import store_folder

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # its tests, and what users installed
SHORTEST_DOCUMENT = 40  # characters; shorter docstrings are "Return self." and the like


def with_demo_corpus(config: Config) -> Config:
    """The configuration with the demo's text as its --train_file, unless it names a text of its own.

    The file is written once, into the folder of the token stores. Raises UserError where that cannot be.
    """
    corpus = config.corpus
    if corpus.dataset_name or corpus.train_file or corpus.validation_file:
        return config
    python = key([sys.version, sysconfig.get_path("stdlib")])
    place = store_folder(config.token_store) / f"python-documentation-{python}.jsonl"
    build_once(place, place.is_file, _write)
    return replace(config, corpus=replace(corpus, train_file=str(place), text_column="text"))


def _write(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))


def documents() -> list[str]:
    """The language reference, a document a topic, then the standard library's docstrings, each text once."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = topics(library / "pydoc_data" / "topics.py")
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - NOT_LIBRARY)
        for file in sorted(files):
            if file.endswith(".py"):
                texts += docstrings(Path(folder, file))
    clean = map(cleandoc, texts)
    return list(dict.fromkeys(text for text in clean if len(text) >= SHORTEST_DOCUMENT))


def topics(path: Path) -> list[str]:
    """The texts of a module that is one assignment: a dict literal of topic names and texts."""
    if not path.is_file():  # some distributions leave the documentation out
        return []
    body = ast.parse(path.read_bytes()).body
    assignment = next(node for node in body if isinstance(node, ast.Assign | ast.AnnAssign))
    return list(ast.literal_eval(assignment.value).values())


def docstrings(path: Path) -> list[str]:
    """The docstrings of a module, outer ones first; an empty text where a definition has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates that are no Python
            return []
    found, nodes = [], [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node, clean=False) or "")
        # Bodies alone: no definition is inside an expression, and expressions are most of a tree.
        for field in ("finalbody", "orelse", "handlers", "cases", "body"):
            nodes += reversed(getattr(node, field, []))
    return found
