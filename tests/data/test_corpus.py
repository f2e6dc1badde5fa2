"""Claims about the corpus: what is a document, what is held out, how a mistake is answered."""

import csv
import gzip
import io
import json
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.data import corpus, faults
from mlm.data.corpus import CorpusConfig, OutOfDomainConfig, identify, load, strip_html
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import corpus_tokenizer, tokenizer_info
from mlm.errors import UserError

ROOT = Path(__file__).parents[2]
LINES = [f"document {number}" for number in range(100)]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """What the datasets library converts goes to a temporary folder, not to the user's cache."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
        patch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "downloads" / "extracted")
        yield cache


def write(path, texts, column="text"):
    """The texts as a file of the kind that its name says, with a second column where there are columns."""
    name = path.name.removesuffix(".gz")
    rows = [{column: text, "label": number} for number, text in enumerate(texts)]
    plain = path.with_name(f"plain-{name}")
    if name.endswith(".txt"):
        plain.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif name.endswith(".jsonl"):
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif name.endswith(".csv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [column, "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(plain)
    data = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def documents(config):
    return {split: list(texts) for split, texts in load(config).splits.items()}


def refusal(function, **config):
    """The message of the UserError that the configuration meets, which is one line."""
    with pytest.raises(UserError) as caught:
        function(CorpusConfig(**config))
    message = str(caught.value)
    assert "\n" not in message
    return message


# What a document is.


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind, packed):
    texts = ["plain", "naïve “quotes”, 漢字", " kept as it is ", "a, b", "12"]
    path = write(tmp_path / f"texts.{kind}{packed}", texts)
    assert documents(CorpusConfig(validation_file=path)) == {"validation": texts}


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three\n"]), ("document", ["one\ntwo\n\nthree\n"])],
)
def test_sample_by_says_what_a_document_of_a_text_file_is(tmp_path, sample_by, expected):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert documents(CorpusConfig(validation_file=str(path), sample_by=sample_by))["validation"] == expected
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "validation.txt")
    config = CorpusConfig(dataset_name=str(tmp_path / "folder"), sample_by=sample_by)
    assert documents(config)["validation"] == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_empty_whitespace_and_null_documents_are_dropped_and_counted(tmp_path, kind):
    path = write(tmp_path / f"texts.{kind}", ["a", "", "b", " \t\n", None, "\u3000"])
    read = load(CorpusConfig(train_file=path, validation_file=path, allow_leaks=True))
    assert [list(read.splits[split]) for split in ("train", "validation")] == [["a", "b"]] * 2
    assert read.dropped == {"train": 4, "validation": 4}


def test_empty_documents_are_dropped_from_a_split_that_is_made(tmp_path):
    path = write(tmp_path / "texts.txt", [*LINES, "", " "])
    read = load(CorpusConfig(train_file=path))
    assert sorted([*read.splits["train"], *read.splits["validation"]]) == sorted(LINES)
    assert read.dropped == {"train": 2, "validation": 0}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_text_column_may_have_any_name(tmp_path, kind):
    path = write(tmp_path / f"texts.{kind}", LINES, column="review")
    assert documents(CorpusConfig(validation_file=path, text_column="review")) == {"validation": LINES}


def test_a_text_of_digits_in_a_csv_file_is_a_text(tmp_path):
    path = write(tmp_path / "texts.csv", ["007", "1.50"])
    assert documents(CorpusConfig(validation_file=path)) == {"validation": ["007", "1.50"]}


def test_a_file_name_is_no_pattern(tmp_path):
    write(tmp_path / "ab.txt", ["wrong"])
    path = write(tmp_path / "a[b]*.txt", ["right"])
    assert documents(CorpusConfig(validation_file=path)) == {"validation": ["right"]}


# Folders.


def test_a_saved_dataset_and_a_saved_dict_are_read(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": LINES, "label": range(100)})
    dataset.save_to_disk(tmp_path / "one")
    held_out = datasets.Dataset.from_dict({"text": ["held", "out"], "label": [0, 1]})
    both = datasets.DatasetDict(train=dataset, validation=held_out)
    both.save_to_disk(tmp_path / "dict")
    files = sorted(tmp_path.rglob("*"))
    one = documents(CorpusConfig(dataset_name=str(tmp_path / "one")))
    assert sorted(one["train"] + one["validation"]) == sorted(LINES)
    two = documents(CorpusConfig(dataset_name=str(tmp_path / "dict"), validation_split_percentage=0))
    assert two == {"train": LINES, "validation": ["held", "out"]}
    assert sorted(tmp_path.rglob("*")) == files  # nothing was written beside the data


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "csv", "parquet"])
def test_a_folder_of_train_and_test_is_split_by_train_alone(tmp_path, kind):
    write(tmp_path / f"train.{kind}", LINES)
    write(tmp_path / f"test.{kind}", ["never", "seen"])
    splits = documents(CorpusConfig(dataset_name=str(tmp_path), validation_split_percentage=20))
    assert sorted(splits["train"] + splits["validation"]) == sorted(LINES)
    assert splits["validation"]


def test_a_validation_file_wins_over_the_dataset_s_own_split(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", LINES)
    write(folder / "validation.jsonl", ["its own"])
    path = write(tmp_path / "mine.txt", ["mine"])
    config = CorpusConfig(dataset_name=str(folder), validation_file=path)
    assert documents(config) == {"train": LINES, "validation": ["mine"]}


# What is held out.


def sides(texts, percentage=30.0):
    hashes = corpus._scan(texts)[0][1]
    return dict(zip(texts, corpus.held_out(hashes, percentage).tolist(), strict=True))


def lowest_share(text, percentage):
    """The oracle: is the text's hash, as a fraction, under the share?"""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64 < percentage / 100


# One text on each side of 30%, so that neither side is ever empty.
ANCHORS = [next(t for t in LINES if lowest_share(t, 30)), next(t for t in LINES if not lowest_share(t, 30))]
characters = st.characters(codec="utf-8", exclude_characters="\0")  # a text of zeros alone is refused as damaged
texts = st.lists(st.text(characters, min_size=1).filter(lambda t: not t.isspace()))


@given(kept=texts, added=texts, seed=st.integers(0, 99))
def test_no_document_changes_sides_when_others_are_added_or_reordered(kept, added, seed):
    before = sides([*ANCHORS, *kept])
    everything = [*added, *kept, *ANCHORS, *kept]
    random.Random(seed).shuffle(everything)
    after = sides(everything)
    assert {text: after[text] for text in before} == before


@given(texts, st.floats(1, 99))
def test_the_held_out_are_those_of_the_lowest_hashes(some, percentage):
    some = [*LINES, *some]
    expected = {text: lowest_share(text, percentage) for text in some}
    assert len(set(expected.values())) == 1 or sides(some, percentage) == expected


@pytest.mark.parametrize("percentage", [1e-30, 1e-6, 50, 99.999999, 99.99999999999999])
def test_neither_side_is_empty_and_equal_texts_share_a_side(tmp_path, percentage):
    path = write(tmp_path / "texts.txt", ["a", "b", "a", "b", "a"])
    splits = documents(CorpusConfig(train_file=path, validation_split_percentage=percentage))
    assert sorted(map(set, splits.values()), key=min) == [{"a"}, {"b"}]
    assert sorted(splits["train"] + splits["validation"]) == ["a", "a", "a", "b", "b"]


def test_about_the_asked_share_is_held_out(tmp_path):
    path = write(tmp_path / "texts.txt", [f"text {number}" for number in range(10_000)])
    assert 400 < len(documents(CorpusConfig(train_file=path))["validation"]) < 600


def test_one_distinct_document_cannot_be_split(tmp_path):
    path = write(tmp_path / "texts.txt", ["same", "same"])
    assert "--validation_file" in refusal(load, train_file=path)


@pytest.mark.parametrize("percentage", [0, 100, -5, float("nan")])
@pytest.mark.parametrize("function", [identify, load])
def test_a_share_that_leaves_a_side_empty_is_refused_where_a_split_is_made(tmp_path, function, percentage):
    path = write(tmp_path / "train.txt", LINES)
    message = refusal(function, train_file=path, validation_split_percentage=percentage)
    assert "--validation_split_percentage" in message
    given = CorpusConfig(train_file=path, validation_file=write(tmp_path / "other.txt", ["another document"]))
    function(replace(given, validation_split_percentage=percentage))
    (tmp_path / "other.txt").unlink()
    folder = {"dataset_name": str(tmp_path), "validation_split_percentage": percentage}
    assert "--validation_split_percentage" in refusal(load, **folder)


# HTML.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was great.<br /><br />The end.", "It was great. The end."),
        ("one <b>bold</b> word <br> more", "one bold word more"),
        ("<p>All of it</p>\n", "All of it\n"),
        ('a<a href="x.html" title="y">link</a  >b', "a link b"),
        ("a<!-- comment -->b<!DOCTYPE html>c<BR>d<my-tag>e<h1>f", "a b c d e f"),
        ("a<br />\n\n<br />b", "a\n\nb"),
        ("AT&amp;T &lt;b&gt; &#8212;&nbsp;caf&eacute;", "AT&T <b> —\xa0café"),
        ("a < b and c > d, a<b, 1<2>0 <3 <- ->", "a < b and c > d, a<b, 1<2>0 <3 <- ->"),
        ("<me@example.org> wrote <stdio.h>", "<me@example.org> wrote <stdio.h>"),
        ("  kept \t as it is ", "  kept \t as it is "),
        ("<br />", ""),
    ],
)
def test_html_is_left_out_and_nothing_else(text, expected):
    assert strip_html(text) == expected


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<&")), min_size=1))
def test_text_between_tags_stays_to_the_letter(parts):
    [first, *others] = parts
    assert strip_html(first) == first
    stripped = strip_html(first + "".join(f"<br />{part}" for part in others))
    assert stripped.split() == " ".join(parts).split()


def test_a_text_of_broken_markup_takes_no_longer_than_its_length():
    for text in ("<" * 10**5, "<b " * 10**5, "<!--" * 10**5, "<b> " * 10**5, "<script>" * 10**5, " " * 10**6):
        started = time.process_time()
        strip_html(text)
        assert time.process_time() - started < 5


MARKED = ["one<br />two", "<p>three</p>", "four &amp; five", "<hr>", "six"]
CLEAN = ["one two", "three", "four & five", "six"]


def read_documents(config):
    read = load(config)
    return {split: list(read.splits[split]) for split in read.splits}, read.dropped


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "csv", "parquet"])
def test_html_is_stripped_from_every_source_where_that_is_asked_for(tmp_path, kind):
    write(tmp_path / f"train.{kind}", MARKED)
    path = write(tmp_path / f"validation.{kind}", MARKED)
    for source in ({"train_file": path, "validation_file": path}, {"dataset_name": str(tmp_path)}):
        found, dropped = read_documents(CorpusConfig(**source, strip_html=True, allow_leaks=True))
        assert found == {"train": CLEAN, "validation": CLEAN}
        assert dropped == {"train": 1, "validation": 1}, "a document of tags alone is an empty one"
        found, dropped = read_documents(CorpusConfig(**source, allow_leaks=True))
        assert found == {"train": MARKED, "validation": MARKED}
        assert dropped == {"train": 0, "validation": 0}


def test_documents_are_read_anew_in_each_iteration(tmp_path):
    path = write(tmp_path / "texts.txt", MARKED)
    for strip in (False, True):
        documents = load(CorpusConfig(validation_file=path, strip_html=strip)).splits["validation"]
        assert list(documents) == list(documents) != []


def test_the_held_out_documents_are_the_same_with_html_and_without(tmp_path):
    path = write(tmp_path / "texts.txt", [f"{line}<br />end" for line in LINES])
    config = CorpusConfig(train_file=path, validation_split_percentage=30)
    marked, _ = read_documents(config)
    clean, _ = read_documents(replace(config, strip_html=True))
    assert clean == {split: [strip_html(text) for text in texts] for split, texts in marked.items()}


def test_the_out_of_domain_text_is_cleaned_as_the_domain_s_is():
    other = OutOfDomainConfig(out_of_domain_file="other.txt")
    for strip in (False, True):
        assert corpus.out_of_domain(other, CorpusConfig(strip_html=strip)).strip_html == strip


@pytest.mark.parametrize("strip", [False, True])
def test_store_and_vocabulary_are_those_of_the_clean_text_where_that_is_asked_for(tmp_path, strip):
    path, clean = write(tmp_path / "a.txt", MARKED * 9), write(tmp_path / "b.txt", CLEAN * 9)
    stores, vocabularies = [], []
    for file in (path, clean):
        config = CorpusConfig(train_file=file, validation_file=file, strip_html=strip, allow_leaks=True)
        tokenizer = corpus_tokenizer(config, 60, tmp_path / "stores")
        vocabularies.append(tokenizer.get_vocab())
        tokenizer = corpus_tokenizer(replace(config, train_file=clean), 60, tmp_path / "stores")
        stores.append(
            prepare(config, tokenizer, tokenizer_info(tokenizer), TokenStoreConfig(str(tmp_path / "stores")))
        )
    for split in ("train", "validation"):
        one, other = (store[split].header["corpus"] for store in stores)
        assert (one == other) == strip
    assert (vocabularies[0] == vocabularies[1]) == strip


# Names.


def test_identifying_imports_no_dataset_library(tmp_path):
    path = write(tmp_path / "texts.csv", LINES)
    code = (
        "import sys; from mlm.data.corpus import CorpusConfig, identify\n"
        f"identify(CorpusConfig(train_file={path!r}))\n"
        "sys.exit(str({'datasets', 'pandas', 'pyarrow'} & {*sys.modules} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""


def test_the_name_changes_with_whatever_changes_the_documents(tmp_path):
    path = tmp_path / "train.txt"
    write(path, LINES)
    other = write(tmp_path / "other.txt", LINES)
    folder = str(tmp_path)
    configs = [
        CorpusConfig(train_file=str(path)),
        CorpusConfig(train_file=other),
        CorpusConfig(validation_file=str(path)),
        CorpusConfig(train_file=str(path), validation_file=other),
        CorpusConfig(train_file=str(path), sample_by="document"),
        CorpusConfig(train_file=str(path), validation_split_percentage=6),
        CorpusConfig(dataset_name=folder),
        CorpusConfig(dataset_name=folder, text_column="review"),
        CorpusConfig(dataset_name=folder, validation_file=other),
        CorpusConfig(train_file=str(path), strip_html=True),
    ]
    names = [json.dumps(identify(config)) for config in configs]
    assert len(set(names)) == len(configs)
    assert names == [json.dumps(identify(config)) for config in configs]
    assert [json.loads(name) for name in names] == [identify(config) for config in configs]

    by_file, by_folder = identify(configs[0]), identify(configs[6])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the same size, a new time
    assert identify(configs[0]) != by_file
    assert identify(configs[6]) != by_folder


@pytest.mark.parametrize("change", ["written over", "replaced"])
def test_the_name_knows_a_file_that_changed_and_hides_it(tmp_path, change):
    """The same size, and the old modification time, as tools that copy with times leave it."""
    path = tmp_path / "train.txt"
    write(path, LINES)
    config, times = CorpusConfig(train_file=str(path)), path.stat()
    before = identify(config)
    new = path if change == "written over" else tmp_path / "new.txt"
    new.write_text(path.read_text().replace("1", "2"))
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert identify(config) != before


def test_the_name_is_the_same_from_any_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "texts.txt", LINES)
    absolute = identify(CorpusConfig(train_file=str(tmp_path / "texts.txt")))
    monkeypatch.chdir(tmp_path)
    assert identify(CorpusConfig(train_file="texts.txt")) == absolute


CHANGING = ["txt", "txt.gz", "jsonl.gz", "json", "csv.gz", "parquet"]


@pytest.mark.parametrize(
    ("kind", "in_folder"),
    [*((kind, False) for kind in [*CHANGING, "parquet.gz"]), *((kind, True) for kind in CHANGING)],
)
def test_a_file_changed_in_place_is_read_again(tmp_path, kind, in_folder):
    path = tmp_path / f"validation.{kind}"
    source = {"dataset_name": str(tmp_path)} if in_folder else {"validation_file": str(path)}
    config = CorpusConfig(**source)
    write(path, ["old"])
    os.utime(path, ns=(0, 10**18))
    assert documents(config) == {"validation": ["old"]}
    write(path, ["new"])
    os.utime(path, ns=(0, 10**18 + 10**9))
    assert documents(config) == {"validation": ["new"]}


def test_local_files_are_read_without_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    path = write(tmp_path / "train.txt", LINES)
    documents(CorpusConfig(train_file=path))
    documents(CorpusConfig(dataset_name=str(tmp_path)))
    assert asked == []


def test_the_library_is_quiet_inside_and_as_it_was_outside(tmp_path, capfd):
    counts, verbosity = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.utils.logging.get_verbosity()
    logger, log = logging.getLogger("datasets"), io.StringIO()
    logger.addHandler(handler := logging.StreamHandler(log))
    load(CorpusConfig(train_file=write(tmp_path / "texts.jsonl", LINES)))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": \n')
    refusal(load, train_file=str(broken))
    logger.removeHandler(handler)
    assert log.getvalue() == ""
    assert capfd.readouterr() == ("", "")
    assert counts == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert datasets.utils.logging.get_verbosity() == verbosity
    assert not datasets.utils.are_progress_bars_disabled()


# Mistakes.


@pytest.mark.parametrize("flag", ["--token_store", "--output_dir"])
def test_what_a_run_writes_into_the_dataset_folder_would_be_text_for_the_next(tmp_path, flag, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", LINES)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    config = CorpusConfig(dataset_name=str(tmp_path / "data"))
    for folder in (tmp_path / "data", tmp_path / "data" / "a" / "b", tmp_path / "link" / "a", "runs/1"):
        with pytest.raises(UserError, match=rf"^{flag} {folder} lies in --dataset_name {tmp_path}/data, .*another"):
            corpus.keep_apart(config, flag, folder)
    for folder in (tmp_path, tmp_path / "data2", tmp_path / "data" / ".." / "runs", "../runs"):
        corpus.keep_apart(config, flag, folder)
    corpus.keep_apart(CorpusConfig(train_file=str(tmp_path / "data" / "train.jsonl")), flag, tmp_path / "data" / "run")
    corpus.keep_apart(CorpusConfig(dataset_name="some/name"), flag, "some/name")


def test_neither_store_nor_vocabulary_is_kept_in_the_dataset_folder(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", LINES)
    config, kept = CorpusConfig(dataset_name=str(tmp_path / "data")), tmp_path / "data" / "stores"
    tokenizer = corpus_tokenizer(config, 60, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--token_store"):
        prepare(config, tokenizer, tokenizer_info(tokenizer), TokenStoreConfig(str(kept)))
    with pytest.raises(UserError, match="--token_store"):
        corpus_tokenizer(config, 60, kept)
    assert not kept.exists()


OUTSIDE = {
    "a pattern": {"data_files": "../elsewhere/*.txt"},
    "splits": {"data_files": [{"split": "train", "path": ["../elsewhere/text.txt"]}]},
    "a list": {"data_files": ["../*/text.txt"]},
    "absolute": {"data_files": "{folder}/elsewhere/text.txt"},
    "a folder": {"data_dir": "../elsewhere"},
}


@pytest.mark.parametrize("points", OUTSIDE)
def test_files_that_the_readme_of_a_folder_points_to_are_part_of_its_name(tmp_path, points):
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text("one\ntwo\n")
    (tmp_path / "folder" / "beside.txt").write_text("not read\n")
    head = json.dumps({"configs": [{"config_name": "default", **OUTSIDE[points]}]}).replace("{folder}", str(tmp_path))
    (tmp_path / "folder" / "README.md").write_text(f"---\n{head}\n---\n# Text\n")
    config = CorpusConfig(dataset_name=str(tmp_path / "folder"), validation_split_percentage=50)
    before = identify(config)
    found = documents(config)
    assert sorted(found["train"] + found["validation"]) == ["one", "two"], "the library reads it"
    (tmp_path / "elsewhere" / "text.txt").write_text("one\ntwo\nthree\n")
    assert identify(config) != before


@pytest.mark.parametrize("head", ["configs: [", "configs: 5", "configs: [5]", "configs: [{data_files: 5}]"])
def test_a_readme_with_a_head_that_cannot_be_read_is_one_line(tmp_path, head):
    write(tmp_path / "train.txt", LINES)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert f"{tmp_path}/README.md: cannot read its head" in refusal(identify, dataset_name=str(tmp_path))
    for harmless in ("# No head\n", "---\nlicense: mit\nconfigs:\n---\n"):
        (tmp_path / "README.md").write_text(harmless)
        identify(CorpusConfig(dataset_name=str(tmp_path)))


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_text_is_read_where_it_is_and_no_copy_of_it_is_made(tmp_path, datasets_cache, kind, packed):
    """But for Parquet in gzip, which can only be read from its end."""
    path = write(tmp_path / f"train.{kind}{packed}", LINES)
    sources = [{"train_file": path}] + [{"dataset_name": str(tmp_path)}] * ((kind, packed) != ("parquet", ".gz"))
    before = files_in(datasets_cache)
    for source in sources:
        tokenizer = corpus_tokenizer(CorpusConfig(**source), 60, tmp_path.with_name("vocabulary"))
        config = TokenStoreConfig(str(tmp_path.with_name("stores")))
        stores = prepare(CorpusConfig(**source), tokenizer, tokenizer_info(tokenizer), config)
        assert sum(store.header["documents"] for store in stores.values()) == len(LINES)
    assert len(files_in(datasets_cache) - before) == (1 if (kind, packed) == ("parquet", ".gz") else 0)


CHANGES = {
    "another text": [*LINES[:50], "another", *LINES[51:]],
    "one text less": LINES[:-1],
    "another order": LINES[::-1],
    "no text": [],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_text_that_changes_between_its_two_readings_is_one_line(tmp_path, kind, change):
    path = tmp_path / f"texts.{kind}"
    read = load(CorpusConfig(validation_file=write(path, LINES))).splits["validation"]
    assert list(read) == LINES
    write(path, CHANGES[change])
    with pytest.raises(UserError, match=rf"^(cannot read )?{path}.*( changed while it was read; run again|: )"):
        list(read)
    path.unlink()
    with pytest.raises(UserError, match=f"^cannot read {path}: FileNotFoundError"):
        list(read)


@pytest.fixture(scope="module")
def source():
    """Of 60 texts in two datasets, and the texts."""
    all_texts = [f"text {number}" for number in range(60)]
    parts = [datasets.Dataset.from_dict({"text": part}) for part in (all_texts[:25], all_texts[25:])]
    return corpus.Source("two datasets", [parts[0], parts[1].to_iterable_dataset()]), all_texts


def documents_at(source, all_texts, places):
    hashes = [corpus._hash(all_texts[place].encode()) for place in places]
    return corpus.Documents(source, np.array(places), np.array(hashes, np.uint64), strip_html=False)


@given(st.lists(st.tuples(st.sets(st.integers(0, 59), min_size=1), st.integers(1, 60)), min_size=1, max_size=6))
def test_any_documents_can_be_read_whatever_was_read_before_and_how_far(source, reads):
    for places, stop in reads:
        read = documents_at(*source, sorted(places))
        expected = [source[1][place] for place in sorted(places)]
        assert list(islice(read, stop)) == expected[:stop]
        assert list(zip(read, read, strict=True)) == list(zip(expected, expected, strict=True))
        assert list(read[len(places) // 2 :] if len(places) > 1 else read) == expected[len(places) // 2 :]


def test_the_documents_of_a_split_are_read_once_where_they_are_read_part_by_part(source, monkeypatch):
    begun = []
    texts = corpus.texts
    monkeypatch.setattr(corpus, "texts", lambda dataset: begun.append(1) or texts(dataset))
    read = documents_at(*source, range(60))
    found = [text for begin in (0, 15, 40) for text in read[begin : {0: 10, 15: 40, 40: 60}[begin]]]
    assert found == source[1][:10] + source[1][15:]
    assert len(begun) == 2, "each of the two datasets once"


def test_a_process_that_is_forked_does_not_read_on_in_the_files_of_its_parent(tmp_path):
    path = write(tmp_path / "texts.txt", [f"{number} " * 2000 for number in range(2000)])
    read = load(CorpusConfig(validation_file=path)).splits["validation"]
    list(read[:500])
    context = multiprocessing.get_context("fork")
    pool = context.Pool(2)
    parts = pool.map_async(partial(numbers, read), [slice(500, 1200), slice(1200, 2000)])
    assert numbers(read, slice(500, 2000)) == list(range(500, 2000))
    assert parts.get(60) == [list(range(500, 1200)), list(range(1200, 2000))]
    pool.terminate()


def numbers(read, part):
    return [int(text.split()[0]) for text in read[part]]


NO_TEXT = {
    "a number": ('{"text": 5}', ": column 'text' holds int64, no text"),
    "a list": ('{"text": ["a"]}', ": column 'text' holds a list, no text"),
    "an object": ('{"text": {"a": "b"}}', ": column 'text' holds an object, no text"),
    "false": ('{"text": false}', ": column 'text' holds bool, no text"),
    "half a pair": (r'{"text": "a \ud83d b"}', r": column 'text' holds half of a surrogate pair, \ud83d"),
    "half a pair elsewhere": (
        r'{"text": "a", "id": "\udc00"}',
        r": column 'id' holds half of a surrogate pair, \udc00",
    ),
    "twice": ('{"text": "a", "text": "b"}', " has the column 'text' twice"),
    "twice elsewhere": ('{"text": "a", "label": 1, "label": 2}', " has the column 'label' twice"),
    "deep": ('{"text": "a", "deep": ' + "[" * 10**5 + "]" * 10**5 + "}", " is nested too deeply"),
}


@pytest.mark.parametrize("row", NO_TEXT)
@pytest.mark.parametrize("place", ["first", "second", "last of many", "in another file"])
def test_a_row_of_a_json_file_that_has_no_text_is_told_with_its_line(tmp_path, row, place):
    bad, fault = NO_TEXT[row]
    good = '{"text": "a", "label": 1}'
    before = {"first": 0, "second": 1, "last of many": 30_000, "in another file": 2}[place]
    path = tmp_path / "train-2.jsonl"
    path.write_text("\n".join([good] * before + [bad, good]))
    source = {"train_file": str(path)}
    if place == "in another file":
        (tmp_path / "train-1.jsonl").write_text("\n".join([good] * 3))
        source = {"dataset_name": str(tmp_path)}
    assert f"{path}: line {before + 1}{fault}" in refusal(load, **source)


def test_json_is_no_worse_for_being_spread_over_lines_or_a_list(tmp_path):
    path = tmp_path / "texts.json"
    rows = [{"text": "a", "label": 1}, {"text": None, "label": None}, {"label": 2.5, "text": "é 👍"}, {"text": "b"}]
    for written in (
        "\n".join(json.dumps(row, indent=1) for row in rows),
        json.dumps(rows, indent=1),
        json.dumps(rows),
    ):
        path.write_text(written, encoding="utf-8")
        assert documents(CorpusConfig(validation_file=str(path))) == {"validation": ["a", "é 👍", "b"]}
    rows[3]["text"] = 7
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert f"{path}: line 13: column 'text' holds int64" in refusal(load, validation_file=str(path))
    path.write_text(json.dumps(rows, indent=1))
    assert f"{path}: row 4 of the list: column 'text' holds int64" in refusal(load, validation_file=str(path))


def test_columns_of_mixed_types_are_told_with_both_lines_where_the_library_fails_on_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a", "n": 1}\n{"text": "b", "n": null}\n{"text": "c", "n": 2.5}\n{"text": "d", "n": "x"}\n'
    )
    assert faults.find_fault(str(path)) == "line 4: column 'n' holds string, but int64 on line 1"


def test_a_gzip_bomb_is_refused_before_it_fills_memory_or_disk(tmp_path):
    path = tmp_path / "train.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(400):
            file.write(b"a" * 2**20)
    before = psutil.Process().memory_info().rss
    for source in ({"train_file": str(path)}, {"dataset_name": str(tmp_path)}):
        assert f"{path}: unpacks to more than 200 times its size" in refusal(load, **source)
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


@pytest.mark.parametrize("function", [identify, load])
def test_no_text_at_all_is_refused_with_the_flags_that_name_one(function):
    assert refusal(function) == "no text: give --dataset_name, --train_file or --validation_file"


@pytest.mark.parametrize("function", [identify, load])
@pytest.mark.parametrize("flag", ["train_file", "validation_file"])
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, function, flag):
    assert refusal(function, **{flag: str(tmp_path / "no.txt")}) == f"--{flag} {tmp_path / 'no.txt'}: no such file"
    (tmp_path / "paper.pdf").write_text("text")
    unknown = refusal(function, **{flag: str(tmp_path / "paper.pdf")})
    assert all(word in unknown for word in (".txt", ".jsonl", ".json", ".csv", ".parquet", ".gz"))
    assert "--dataset_name" in refusal(function, **{flag: str(tmp_path)})


@pytest.mark.parametrize("function", [identify, load])
def test_two_sources_of_training_text_are_refused(tmp_path, function):
    path = write(tmp_path / "train.txt", LINES)
    message = refusal(function, dataset_name=str(tmp_path), train_file=path)
    assert "--dataset_name" in message
    assert "--train_file" in message
    assert "--train_file" in refusal(function, dataset_name=path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n\t\n"),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n'),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"text,label\n"),
    ],
)
def test_a_file_without_a_document_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    message = refusal(load, train_file=str(tmp_path / name))
    assert name in message
    assert "empty" in message or "no document" in message


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_text_column_is_told_with_the_columns_there_are(tmp_path, kind):
    path = write(tmp_path / f"train.{kind}", LINES, column="review")
    for source in ({"train_file": path}, {"dataset_name": str(tmp_path)}):
        message = refusal(load, **source)
        assert all(word in message for word in (str(tmp_path), "'text'", "review", "label", "--text_column"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_text_column_without_strings_is_refused(tmp_path, kind):
    message = refusal(load, train_file=write(tmp_path / f"a.{kind}", LINES), text_column="label")
    assert "int64" in message
    assert "--text_column" in message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train.txt", b"f\xc3\xafne\ncaf\xe9\nfine\n"),
        ("train.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n'),
        ("train.json", b'[{"text": "fine"},\n {"text": "caf\xe9"}]'),
        ("train.csv", b"text\ncaf\xe9\n"),
    ],
)
def test_bytes_that_are_not_utf8_are_told_with_line_and_offset(tmp_path, name, data, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    where = f"{path}: line 2 is not UTF-8 (byte 0xe9 at offset {data.index(0xE9)})"
    assert where in refusal(load, train_file=str(path))
    assert where in refusal(load, dataset_name=str(tmp_path))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'{"text": "a"}\n{"text": nope}\n{"text": "b"}\n', 2),
        (b'{"text": "a"}\n\n{"text": "cut off', 3),
        (b'{"text": "a"}\n{"text": "b"} {"text": "c"\n', 2),
        (b'{"text": "a"}\n"no object"\n', 2),
        (b'[{"text": "a"},\n {"text": "b"},\n {"text": }]', 3),
    ],
)
def test_a_broken_json_line_is_told_with_its_number(tmp_path, data, line):
    for name in ("a.jsonl", "a.json.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        assert f"{path}: line {line} is" in refusal(load, train_file=str(path))


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path):
    for name in ("a.parquet", "b.txt.gz", "c.parquet.gz"):
        (tmp_path / name).write_bytes(b"neither parquet nor gzip")
        assert name in refusal(load, train_file=str(tmp_path / name))


def test_a_failure_of_the_library_is_told_in_its_own_words(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"never closed,1\n')
    message = refusal(load, train_file=str(tmp_path / "a.csv"))
    assert message.startswith(f"cannot read {tmp_path / 'a.csv'}: ParserError: ")


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no data")
    assert "holds no data files" in refusal(identify, dataset_name=str(tmp_path))
    (tmp_path / "test.txt").write_text("only a test split\n")
    assert "neither a train nor a validation split, only test" in refusal(load, dataset_name=str(tmp_path))


@pytest.mark.parametrize("function", [identify, load])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path, function):
    assert refusal(function, dataset_name=str(tmp_path / "no")).startswith("no such folder")


@pytest.mark.parametrize(
    "network", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_hub_name_without_network_is_the_cached_commit_or_one_line(tmp_path, network):
    code = (
        "from mlm.data.corpus import CorpusConfig, identify, load; from mlm.errors import UserError\n"
        "for function, name in ((identify, 'some/cached'), (identify, 'some/other'), (load, 'some/other')):\n"
        "    try: print(function(CorpusConfig(dataset_name=name))['dataset'])\n"
        "    except UserError as error: print(error)\n"
    )
    ref = tmp_path / "hub" / "datasets--some--cached" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("c0ffee")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), **network}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stderr == ""
    cached, *refused = done.stdout.splitlines()
    assert cached == "['some/cached', 'c0ffee']"
    assert len(refused) == 2
    assert all("some/other" in line and "no network" in line for line in refused)
