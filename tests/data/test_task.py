"""Labelled documents: which are taken, and the mistakes that are named before anything is trained."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mlm.data.corpus import CorpusConfig, text_hash
from mlm.data.task import MOST, Task, TaskConfig, read_task
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import tokenizer_info
from mlm.errors import UserError
from tests.tokenizers_for_tests import wordpiece


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(labels, text="review"):
    return [{"text": f"{text} {i}", "label": label} for i, label in enumerate(labels)]


def read(path, domain=None, **settings):
    return read_task(TaskConfig(task_file=path, **settings), domain or CorpusConfig())


def test_documents_without_text_or_label_are_left_out(tmp_path):
    labelled = [*rows([0] * 10 + [1] * 10), {"text": " ", "label": 0}, {"text": "no label", "label": None}]
    task = read(write(tmp_path / "a.jsonl", labelled))
    assert task.texts == [(f"review {i}",) for i in range(20)]
    np.testing.assert_array_equal(task.labels, [0] * 10 + [1] * 10)


def test_markup_is_removed_where_the_domain_s_is(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(["x", "y"] * 10, text="good<br />"))
    assert read(path, CorpusConfig(strip_html=True)).texts[0] == ("good 0",)
    assert read(path).texts[0] == ("good<br /> 0",)


def test_pairs_and_columns_have_names_of_their_own(tmp_path):
    pairs = [{"premise": f"a {i}", "hypothesis": f"b {i}", "gold": i % 2 == 0} for i in range(20)]
    columns = {"task_text_column": "premise", "task_pair_column": "hypothesis", "task_label_column": "gold"}
    task = read(write(tmp_path / "a.jsonl", pairs), **columns)
    assert task.texts[3] == ("a 3", "b 3")
    assert task.labels.tolist() == [1, 0] * 10  # "False" before "True"


def test_of_many_documents_a_part_is_drawn_the_same_each_time_and_said_to_be(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [*rows([0, 1] * (MOST // 2)), {"text": "", "label": 0}])
    assert len(read(path).texts) == MOST
    assert "are taken" not in caplog.text
    path = write(tmp_path / "b.jsonl", all_rows := rows([0, 1] * (MOST // 2 + 50)))
    task = read(path)
    assert len(task.texts) == len(task.labels) == MOST
    assert read(path).texts == task.texts
    assert [all_rows[i]["text"] for i in task.rows] == [text for [text] in task.texts]
    assert task.of == (MOST + 100, MOST)
    assert caplog.messages[-1] == f"{path}: of its {MOST + 100} rows {MOST} are taken, drawn by a fixed seed"


def test_what_a_file_is_called_moves_no_terminal_when_a_part_of_it_is_drawn(tmp_path, caplog):
    read(write(tmp_path / "a\x1b[2J.jsonl", rows([0, 1] * (MOST // 2 + 1))))
    assert "\x1b" not in caplog.text and r"a\x1b[2J.jsonl: of its" in caplog.text


def stored(domain, folder):
    tokenizer = wordpiece(["review something else"])
    return prepare(domain, tokenizer, tokenizer_info(tokenizer), TokenStoreConfig(token_store=str(folder / "stores")))


def test_rows_without_a_text_or_a_label_are_counted(tmp_path, caplog):
    """In a .csv file None is a gap, as pandas has it, and may have been a class."""
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"review {i},{('None', 'pro', 'contra')[i % 3]}\n" for i in range(60)))
    assert len(read(str(file)).texts) == 40
    assert f"{file}: 20 of its 60 rows lack a text or a label" in caplog.text


@pytest.mark.parametrize("columns", [{"task_label_column": "text"}, {"task_pair_column": "text"}])
def test_a_column_is_not_read_as_two_things(tmp_path, columns):
    with pytest.raises(UserError, match="the text has a column of its own"):
        read(write(tmp_path / "a.jsonl", rows([0, 1] * 10)), **columns)


def test_what_is_trained_on_is_all_of_it(tmp_path):
    texts = [SimpleNamespace(text_hashes=np.sort(np.array([text_hash(t) for t in own], np.uint64))) for own in "ab"]
    assert Task("task", [("c",), ("b",), ("a",)], None).seen(*texts).tolist() == [False, True, True]


def test_documents_in_the_training_text_are_counted_whatever_their_case_and_white_space(tmp_path):
    train = tmp_path / "train.txt"
    train.write_text("REVIEW   3\nreview 7\nreview 70\nsomething else\n")
    held_out = tmp_path / "validation.txt"
    held_out.write_text("review 9\n")
    domain = CorpusConfig(train_file=str(train), validation_file=str(held_out))
    assert read(write(tmp_path / "a.jsonl", rows([0, 1] * 10))).seen(stored(domain, tmp_path)["train"]).sum() == 2


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        ([{"text": "a"}] * 20, "has no column 'label': name it with --task_label_column"),
        ([{"review": "a", "label": 0}] * 20, "name it with --task_text_column"),
        (rows([0.5, 1.5] * 10), "holds float64; a probe needs one class"),
        (rows([[0, 1], [1]] * 10), "holds lists or objects; a probe needs one class"),
        (rows([0] * 20), "1 classes in 20 documents"),
        (rows(["x"] * 12 + ["rare\x1b[31m"] * 9), "2 classes in 21 documents, 'rare\\x1b[31m' with 9"),
        (rows([None] * 20), "0 classes in 0 documents"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path, labelled, message):
    with pytest.raises(UserError) as refused:
        read(write(tmp_path / "a.jsonl", labelled))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "--train_file" not in str(refused.value)


def test_a_file_that_is_missing_is_named_by_the_task_s_flag(tmp_path):
    with pytest.raises(UserError, match=f"--task_file {tmp_path / 'none.jsonl'}: no such file"):
        read(str(tmp_path / "none.jsonl"))


def test_no_task_is_none():
    assert read_task(TaskConfig(), CorpusConfig()) is None


def test_a_configuration_of_a_data_set_is_chosen_by_its_name(tmp_path):
    for name in ("small", "large"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write(tmp_path / "data" / name / "train.jsonl", rows(["x", "y"] * 10, text=name))
    head = [{"config_name": name, "data_dir": name} for name in ("small", "large")]
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs: {json.dumps(head)}\n---\n")
    config = TaskConfig(task_dataset_name=str(tmp_path / "data"), task_dataset_config_name="large")
    assert read_task(config, CorpusConfig()).texts[0] == ("large 0",)


def searched(path, pairs, **settings):
    path = write(path, [{"query": query, "document": document} for query, document in pairs])
    columns = {"task_text_column": "query", "task_pair_column": "document"}
    return read(path, task_kind="retrieval", **columns, **settings)


def test_queries_and_documents_are_taken_once_and_their_pairs_kept(tmp_path):
    pairs = [(f"q {i}", f"d {i}") for i in range(10)]
    task = searched(tmp_path / "a.jsonl", [*pairs, ("q 3", "d 5"), ("q 3", "d 3"), ("q 7", "q 7"), ("q 9", " ")])
    texts = [text for (text,) in task.texts]
    assert sorted(texts) == sorted([*(f"q {i}" for i in range(10)), *(f"d {i}" for i in range(10)), "q 7"])
    found = {(texts[query], texts[document]) for query, document in task.pairs}
    assert found == {*pairs, ("q 3", "d 5"), ("q 7", "q 7")}
    assert (task.pairs[:, 0].max(), task.pairs[:, 1].min()) == (9, 10)  # the queries come first
    assert task.labels is None


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("q 1", f"d {i}") for i in range(20)], "--task_kind retrieval needs 10 queries or more"),
        ([(f"q {i}", " ") for i in range(20)], "--task_kind retrieval needs 10 queries or more"),
        ([(f"q {i}", i) for i in range(20)], "column 'document' holds int64, no text: choose with --task_pair_column"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, pairs, message):
    with pytest.raises(UserError) as refused:
        searched(tmp_path / "a.jsonl", pairs)
    assert message in str(refused.value)


def test_a_search_needs_documents():
    with pytest.raises(
        UserError, match="--task_kind retrieval: name the column of the documents with --task_pair_col"
    ):
        TaskConfig(task_file="a.jsonl", task_kind="retrieval")
