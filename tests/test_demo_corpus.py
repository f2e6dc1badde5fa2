"""scripts/demo_corpus.py: the demo's text is this Python's own documentation, written once."""

import subprocess
import sys

import datasets
import pytest

from mlm.config import Config
from mlm.data.corpus import identify, load
from mlm.errors import UserError
from tests.conftest import REPOSITORY
from tests.scripts import load_script

script = load_script("demo_corpus")


@pytest.fixture(scope="module")
def documents():
    return script.documents()


def test_the_demo_corpus_is_english_prose(documents):
    assert len(documents) == len(set(documents)) > 5000
    assert sum(map(len, documents)) > 1_500_000
    assert min(map(len, documents)) >= 40
    assert sum(" the " in text for text in documents) > len(documents) / 3
    assert any(text.startswith('The "for" statement') for text in documents)  # a topic of the reference
    assert any(text.startswith("Simple JSON <") for text in documents)  # json.JSONDecoder's docstring


def test_docstrings_are_found_at_any_depth(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        """
"module"
if x:
    try:
        pass
    except E:
        def f():
            "in except"
            class C:
                "in function"
    else:
        async def g():
            "async"
match x:
    case 1:
        def h():
            "in case"
raise SystemExit("imported")
"""
    )
    assert sorted(filter(None, script.docstrings(path))) == sorted(
        ["module", "in except", "in function", "async", "in case"]
    )


def test_a_library_module_is_read_and_neither_tests_nor_packages(tmp_path, monkeypatch):
    for folder in ("json", "test", "json/tests", "site-packages/package"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text(f'"""{folder} {"has a docstring " * 3}"""')
    (tmp_path / "template.py").write_text("no {{ python }}")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [text.split()[0] for text in script.documents()] == ["json"]


def test_without_a_text_the_demo_trains_on_its_own_the_same_each_time(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    config = script.with_demo_corpus(
        Config.of(token_store=str(tmp_path / "stores"), text_column="review", allow_leaks=True)
    )
    read = load(config.corpus)
    in_validation = set(read.splits["validation"])
    assert list(read.splits["train"]) == [text for text in documents if text not in in_validation]
    assert list(read.splits["validation"]) == [text for text in documents if text in in_validation]
    name = identify(config.corpus)
    again = Config.of(token_store=str(tmp_path / "stores"), allow_leaks=True)
    assert identify(script.with_demo_corpus(again).corpus) == name, "it is written once"


@pytest.mark.parametrize("flag", ["dataset_name", "train_file", "validation_file"])
def test_a_text_that_is_given_is_left_alone(flag, tmp_path):
    config = Config.of(token_store=str(tmp_path / "stores"), **{flag: "mine"})
    assert script.with_demo_corpus(config) is config
    assert not (tmp_path / "stores").exists()


@pytest.mark.torture
def test_processes_that_start_together_train_on_the_same_file(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'scripts'); from demo_corpus import with_demo_corpus\n"
        "from mlm.config import Config; from mlm.data.corpus import identify\n"
        f"print(identify(with_demo_corpus(Config.of(token_store={str(tmp_path)!r})).corpus))"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (run.communicate()[0] for run in runs)
    assert one == other != ""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--token_store .*file/stores: cannot write there"):
        script.with_demo_corpus(Config.of(token_store=str(tmp_path / "file" / "stores")))
