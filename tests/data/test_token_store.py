"""Claims about the token store: what is in it, and when it is built, found and rebuilt."""

import errno
import fcntl
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlm.data import corpus, shards, token_store, verify
from mlm.data.cache import key
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStoreConfig, Unusable, check_words, open_store, prepare, store_folder
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.data.verify import checksum
from mlm.errors import UserError
from mlm.files import write_json
from tests.conftest import REPOSITORY
from tests.data.stores import CHINESE, TEXTS, TOKENIZERS, built, documents_of, kinds, slow_tokenizer
from tests.oracles import tokens_of
from tests.tokenizers_for_tests import unigram, wordpiece


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """What the datasets library converts goes to a temporary folder, not to the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def test_a_slow_tokenizer_works_and_has_no_words(tmp_path):
    tokenizer = slow_tokenizer(tmp_path)
    store = built(["L A G", "GAL"], tokenizer, tmp_path / "store")
    assert documents_of(store) == [([0, 4, 5, 6, 2], [True] * 5), ([0, 6, 5, 4, 2], [True] * 5)]
    assert store.header["words"] is None
    with pytest.raises(UserError, match=r"--whole_word_mask.*slow.*--tokenizer_name"):
        check_words(store)


THAI = ["โรงแรมนี้สะอาดและบริการดีมากครั้งหน้าจะมาอีกแน่นอน", "อาหารเช้ามีให้เลือกไม่มากแต่ทำเลสะดวกมาก"] * 9


@pytest.mark.parametrize("texts", [CHINESE, THAI], ids=["Chinese", "Thai"])
def test_unsegmented_text_under_sentencepiece_has_no_words_to_mask(texts, tmp_path):
    letters = sorted({letter for text in texts for letter in text})
    tokenizer = unigram(letters, 300)
    store = built(texts, tokenizer, tmp_path)
    tokens = sum(len(tokens_of(tokenizer, text)[0]) - 2 for text in texts)
    mean = tokens / len(texts)  # a document is one word
    with pytest.raises(UserError, match=rf"--whole_word_mask.*words of {mean:.0f} tokens on average.*at most 10"):
        check_words(store)


def test_chinese_under_berts_pre_tokenizer_has_words(tmp_path):
    store = built(CHINESE, wordpiece(CHINESE, 300), tmp_path)
    assert store.mean_word == 1
    check_words(store)


@kinds
def test_english_has_words(kind, tmp_path):
    check_words(built(TEXTS, TOKENIZERS[kind], tmp_path))


@pytest.mark.parametrize("splits", [["train"], ["validation"], ["train", "validation"]], ids="+".join)
def test_preparing_says_once_that_the_tokenizer_sees_no_words(splits, world, caplog):
    for split in splits:
        texts = CHINESE if split == "train" else [text[::-1] for text in CHINESE]
        getattr(world, f"{split}_file").write_text("\n".join(texts))
    letters = sorted({letter for text in CHINESE for letter in text})
    world.tokenizer = unigram(letters, 300)
    mean = np.mean([len(tokens_of(world.tokenizer, text)[0]) - 2 for text in CHINESE])
    for _ in ("built", "found"):
        caplog.clear()
        world.prepare()
        ((logger, level, message),) = caplog.record_tuples
        assert (logger, level) == ("mlm.data.token_store", logging.WARNING)
        assert f"words of {mean:.0f} tokens on average" in message
        assert "whole words cannot" in message


@kinds
def test_preparing_english_says_nothing(kind, world, caplog):
    for _ in ("built", "found"):
        world.prepare(TOKENIZERS[kind])
    assert caplog.text == ""


def test_preparing_with_a_slow_tokenizer_or_with_unknown_letters_says_nothing(world, tmp_path, caplog):
    world.train_file.write_text("ж ж\n")
    world.prepare()
    world.prepare(slow_tokenizer(tmp_path))
    assert caplog.text == ""


def test_text_of_unknown_tokens_alone_has_no_words(tmp_path):
    store = built(["ж ж"], TOKENIZERS["wordpiece"], tmp_path)
    assert (store.header["unknown_tokens"], store.header["words"]) == (2, 0)
    with pytest.raises(UserError, match="--whole_word_mask"):
        check_words(store)


@pytest.mark.parametrize(
    ("size", "dtype"), [(200, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_ids_take_the_smallest_unsigned_type(size, dtype, tmp_path):
    vocabulary = {"[UNK]": 0, "[MASK]": 1, **{f"w{token_id}": token_id for token_id in range(2, size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
    store = built([f"w2 w{size - 1} x"], tokenizer, tmp_path)
    assert store.ids.dtype == dtype
    assert store.ids.tolist() == [2, size - 1, 0]


def test_batches_of_documents_leave_no_trace(tmp_path, monkeypatch):
    texts = [f"{TEXTS[number % 3]} {number}" for number in range(50)]
    whole = built(texts, TOKENIZERS["wordpiece"], tmp_path / "whole")
    for name, size in (("BATCH_DOCUMENTS", 7), ("BATCH_CHARACTERS", 100)):
        monkeypatch.setattr(shards, name, size)
        parts = built(iter(texts), TOKENIZERS["wordpiece"], tmp_path / name)
        for array in token_store.ARRAYS:
            assert np.array_equal(getattr(parts, array), getattr(whole, array))
        timeless = {"seconds": 0}
        assert parts.header | timeless == whole.header | timeless


def test_the_corpus_fingerprint_knows_where_documents_end(tmp_path):
    cuts = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"]]
    stores = [built(cut, TOKENIZERS["wordpiece"], tmp_path / str(n)) for n, cut in enumerate(cuts)]
    assert len({store.header["corpus"] for store in stores}) == len(cuts)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(documents):
        tracemalloc.start()
        built((f"{TEXTS[0]} {number}" for number in range(documents)), TOKENIZERS["wordpiece"], tmp_path)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(12_000) < 1.2 * peak(4_000)


@pytest.fixture
def world(tmp_path):
    """A corpus of two files, a tokenizer and a place for stores; `prepare(…)` with them."""
    return World(tmp_path)


class World:
    def __init__(self, folder: Path, repeat: int = 1) -> None:
        self.train_file, self.validation_file = folder / "train.txt", folder / "validation.txt"
        self.train_file.write_text("".join(f"{text}\n\n" for text in TEXTS * repeat))
        self.validation_file.write_text("the fox likes mice ж\n")
        self.tokenizer, self.folder = TOKENIZERS["wordpiece"], folder / "stores"
        self.source = CorpusConfig(train_file=str(self.train_file), validation_file=str(self.validation_file))

    def prepare(self, tokenizer=None, **options):
        tokenizer = tokenizer or self.tokenizer
        config = TokenStoreConfig(token_store=str(self.folder), **options)
        return prepare(self.source, tokenizer, tokenizer_info(tokenizer), config)

    def stores(self):
        """The folders where stores are kept; beside each lies its lock file."""
        return [path for path in self.folder.iterdir() if path.suffix != ".lock"]

    def files(self):
        """{path: modification time} of all that is in them."""
        files = [path for store in self.stores() for path in store.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    def python(self, code, **options):
        """Starts a Python in which `again()` is `prepare` with the same files and the tokenizer from disk."""
        self.tokenizer.save_pretrained(self.folder.parent / "tokenizer")
        code = (
            "import sys\n"
            "from mlm.data.corpus import CorpusConfig\n"
            "from mlm.data.token_store import TokenStoreConfig, prepare\n"
            "from mlm.data.tokenizer import load_tokenizer, tokenizer_info\n"
            "def again():\n"
            f"    tokenizer = load_tokenizer({str(self.folder.parent / 'tokenizer')!r})\n"
            f"    config = TokenStoreConfig(token_store={str(self.folder)!r})\n"
            f"    return prepare({self.source!r}, tokenizer, tokenizer_info(tokenizer), config)\n{code}"
        )
        environment = {**os.environ, "HF_HOME": str(self.folder.parent / "hf")}
        pipes = {"stdout": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, **pipes)


def test_the_header_counts_what_is_in_the_split(world):
    stores = world.prepare()
    assert list(stores) == ["train", "validation"]
    header = stores["train"].header
    tokens = [tokens_of(world.tokenizer, text) for text in TEXTS]
    assert header["version"] == token_store.FORMAT_VERSION
    assert header["tokenizer"] == tokenizer_info(world.tokenizer).fingerprint
    assert (header["documents"], header["empty_documents"]) == (len(TEXTS), len(TEXTS))
    assert header["tokens"] == sum(len(ids) for ids, _ in tokens) == len(stores["train"].ids)
    assert header["maskable_tokens"] == header["tokens"] - 2 * len(TEXTS)
    assert header["words"] == sum(sum(starts) for _, starts in tokens) - 2 * len(TEXTS)
    assert header["unknown_tokens"] == 0
    assert stores["validation"].header["unknown_tokens"] == 1
    ids = [token for document, _ in tokens for token in document]
    assert stores["train"].token_counts.tolist() == [ids.count(token) for token in range(len(world.tokenizer))]
    lengths = [len(document) for document, _ in tokens]
    assert stores["train"].document_lengths.tolist() == [lengths.count(n) for n in range(max(lengths) + 1)]
    assert documents_of(stores["train"]) == tokens


def test_the_longest_documents_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "LONGEST", 8)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 10)  # so that documents come in several batches
    store = built(["fox " * words for words in (1, 5, 6, 7, 700, 2)], TOKENIZERS["wordpiece"], tmp_path)
    assert np.diff(store.document_offsets).tolist() == [3, 7, 8, 9, 702, 4]
    assert store.document_lengths.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 3]


def test_a_second_run_finds_its_store(world):
    first = world.prepare()
    files = world.files()
    second = world.prepare()
    assert world.files() == files
    for split in ("train", "validation"):
        assert second[split].header == first[split].header
        assert documents_of(second[split]) == documents_of(first[split])
    run = world.python("again(); print('datasets' in sys.modules)")
    assert run.communicate()[0].split() == [b"False"], "what is prepared needs no dataset library"
    assert world.files() == files


def test_overwrite_cache_builds_anew(world):
    world.prepare()
    files = world.files()
    world.prepare(overwrite_cache=True)
    rebuilt = world.files()
    assert rebuilt.keys() == files.keys()
    assert all(rebuilt[path] > files[path] for path in files)


def damage_truncate(store):
    data = (store / "train" / "ids.npy").read_bytes()
    (store / "train" / "ids.npy").write_bytes(data[:-1])


def damage_shorten(store):
    np.save(store / "train" / "ids.npy", np.load(store / "train" / "ids.npy")[:-1])


def damage_no_header(store):
    (store / "train" / "header.json").unlink()


def damage_half_a_header(store):
    text = (store / "train" / "header.json").read_text()
    (store / "train" / "header.json").write_text(text[: len(text) // 2])


def damage_empty_header(store):
    (store / "validation" / "header.json").write_text("")


def damage_header_of_nothing(store):
    (store / "train" / "header.json").write_text("[]")


def damage_no_array(store):
    (store / "validation" / "word_starts.npy").unlink()


def damage_no_validation(store):
    for path in (store / "validation").iterdir():
        path.unlink()
    (store / "validation").rmdir()


def damage_version(store):
    change_header(store, version=0)


def damage_version_2(store):
    """As the version before wrote it, which counted ordinary tokens."""
    header = json.loads((store / "train" / "header.json").read_text())
    header |= {"version": 2, "ordinary_tokens": header.pop("maskable_tokens")}
    del header["seal"], header["checksums"], header["vocabulary_size"]
    (store / "train" / "header.json").write_text(json.dumps(header))


def damage_version_4(store):
    """As the version before wrote it, which counted tokens at the end of each run."""
    header = json.loads((store / "train" / "header.json").read_text())
    for name in ("token_counts", "document_lengths"):
        (store / "train" / f"{name}.npy").unlink()
        del header["bytes"][name], header["checksums"][name]
    change_header(store, version=4, bytes=header["bytes"], checksums=header["checksums"])


def damage_version_5(store):
    """As the version before wrote it, whose fingerprint of the text was made document after document."""
    change_header(store, version=5)


def damage_tokenizer(store):
    change_header(store, tokenizer="another")


def damage_corpus(store):
    change_header(store, identity={"train_file": "another"})


def damage_an_older_header(store):
    path = store / "train" / "header.json"
    header = json.loads(path.read_text())
    del header["splits"]
    path.write_text(json.dumps(header))


def damage_seal(store):
    path = store / "train" / "header.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"words": header["words"] + 1}))


def damage_zeroed_ids(store):
    ids = np.load(store / "train" / "ids.npy")
    np.save(store / "train" / "ids.npy", np.zeros_like(ids))


def damage_shuffled_ids(store):
    ids = np.load(store / "train" / "ids.npy")
    np.save(store / "train" / "ids.npy", ids[::-1])


def damage_one_bit_in_place(store):
    """As a disk does it: neither size nor modification time tells."""
    path = store / "validation" / "word_starts.npy"
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        [last] = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage_bytes_of_another_type(store):
    path = store / "train" / "document_offsets.npy"
    path.write_bytes(path.read_bytes().replace(b"'<i8'", b"'>i8'"))


def damage_ids_beyond_the_vocabulary(store):
    """Here and below the checksums are those of what is in the files: a store that was built wrong."""
    change_array(store, "ids", lambda ids: np.where(np.arange(len(ids)) == 7, 255, ids).astype(ids.dtype))


def damage_falling_offsets(store):
    change_array(store, "document_offsets", lambda offsets: np.r_[0, offsets[-2:0:-1], offsets[-1]])


def damage_offsets_that_end_early(store):
    change_array(store, "document_offsets", lambda offsets: np.r_[offsets[:-1], offsets[-1] - 1])


def damage_token_counts(store):
    change_array(store, "token_counts", lambda counts: counts + (np.arange(len(counts)) == 7))


def damage_document_lengths(store):
    change_array(store, "document_lengths", lambda lengths: lengths[:-1])


def damage_an_array_of_another_length(store):
    change_array(store, "word_starts", lambda starts: starts[:-1])


def change_array(store, name, change):
    path = store / "train" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    header = json.loads((store / "train" / "header.json").read_text())
    header["bytes"][name] = path.stat().st_size
    change_header(store, bytes=header["bytes"], checksums=header["checksums"] | {name: checksum(path)})


def change_header(store, **changes):
    """Changes the header as the program itself would write it."""
    path = store / "train" / "header.json"
    header = json.loads(path.read_text()) | changes
    del header["seal"]
    path.write_text(json.dumps(header | {"seal": key(header)}))


def test_a_version_that_somebody_else_has_written_is_shown_in_letters(tmp_path):
    (tmp_path / "header.json").write_text(json.dumps({"version": "\x1b[31mX"}))
    with pytest.raises(token_store.Unusable, match=r"^it is of format version '\\x1b\[31mX', not "):
        token_store.open_store(tmp_path, "")


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_store_is_rebuilt_not_used_and_a_line_says_so(damage, world, caplog):
    expected = {split: documents_of(store) for split, store in world.prepare().items()}
    (store,) = world.stores()
    inode = store.stat().st_ino
    world.prepare()
    assert (store.stat().st_ino, caplog.text) == (inode, ""), "a store that is whole is used"

    damage(store)
    rebuilt = world.prepare()
    assert store.stat().st_ino != inode
    assert {split: documents_of(store) for split, store in rebuilt.items()} == expected
    [line] = caplog.messages
    assert line.startswith(f"{store}: ")
    assert line.endswith("; building it anew")
    beside = {store, store.with_name(f"{store.name}.lock")}
    assert set(world.folder.iterdir()) == beside, "in the same place, beside it its lock file alone"


def test_another_tokenizer_has_a_store_of_its_own(world):
    first = world.prepare()
    assert documents_of(first["train"]) == [tokens_of(world.tokenizer, text) for text in TEXTS]
    other = TOKENIZERS["byte_level_bpe"]
    assert documents_of(world.prepare(other)["train"]) == [tokens_of(other, text) for text in TEXTS]
    first, second = world.stores()
    for folder in (first, second):
        refused = 0
        for tokenizer in (world.tokenizer, other):
            try:
                open_store(folder / "train", tokenizer_info(tokenizer).fingerprint)
            except Unusable as why:
                refused += str(why) == "it is another tokenizer's"
        assert refused == 1, "each opens for its own tokenizer"


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read to be verified."""
    names = []

    def counted(path):
        names.append(f"{path.parent.name}/{path.name}")
        return checksum(path)

    monkeypatch.setattr(verify, "checksum", counted)
    return names


ALL_ARRAYS = sorted(f"{split}/{array}.npy" for split in ("train", "validation") for array in token_store.ARRAYS)


def test_a_store_is_read_to_verify_it_once_a_machine_and_boot(world, read):
    world.prepare()
    assert sorted(read) == ALL_ARRAYS
    for _ in range(2):
        read.clear()
        world.prepare()
        assert read == []
    world.prepare(verify_store=True)
    assert sorted(read) == ALL_ARRAYS
    for name in ("another", "a third"):
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.setattr(verify, "_machine", lambda name=name: name)
            read.clear()
            world.prepare()
            world.prepare()
            assert sorted(read) == ALL_ARRAYS, "by another machine once more"
    read.clear()
    world.prepare()
    assert read == [], "machines that share a store do not forget each other"


def test_a_file_that_changes_after_it_was_verified_is_read_again(world, read):
    world.prepare()
    (path,) = world.folder.glob("*/train/ids.npy")
    times = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    read.clear()
    world.prepare()
    assert sorted(set(read)) == [name for name in ALL_ARRAYS if name.startswith("train")]


def test_damage_that_no_stamp_shows_is_found_and_mended_when_a_store_is_verified(world, caplog):
    """A bit flips on the disk: sizes, times and inodes stay."""
    expected = documents_of(world.prepare()["train"])
    (path,) = world.folder.glob("*/train/ids.npy")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    record = path.with_name("verified.json")
    [machine] = json.loads(record.read_text())
    stamps = {file: verify.stamp(path.with_name(file)) for file in json.loads(record.read_text())[machine]}
    write_json(record, {machine: stamps})
    assert documents_of(world.prepare()["train"]) != expected, "nobody looks"
    assert documents_of(world.prepare(verify_store=True)["train"]) == expected
    assert "ids.npy is not what was written; building it anew" in caplog.text


CUT = "was cut short while in use; run again, which builds the token store anew"


def cut_short(world, array, program):
    """How many rows a program prints that it has, the file that is cut short then, and what the program says next."""
    world.train_file.write_text("".join(f"{text}\n" for text in TEXTS * 1000))
    run = world.python(program, stdin=subprocess.PIPE)
    rows = int(run.stdout.readline())
    (path,) = world.folder.glob(f"*/train/{array}.npy")
    os.truncate(path, 5000)
    said, _ = run.communicate(b"\n")
    assert run.returncode == 0, "no signal"
    return rows, path, said.decode()


@pytest.mark.parametrize("array", ["ids", pytest.param("word_starts", marks=pytest.mark.torture)])
def test_a_store_that_is_cut_short_while_it_is_mapped_is_one_line_not_a_bus_error(array, world):
    rows, path, said = cut_short(
        world,
        array,
        "import sys, numpy as np\n"
        "from mlm.data.chunks import concatenate\n"
        "from mlm.errors import UserError\n"
        "store = again()['train']\n"
        "chunks = concatenate(store.ids, store.word_starts, 16, 0, 'drop')\n"
        "print(len(chunks.take(np.arange(len(chunks))).ids), flush=True)\n"
        "sys.stdin.readline()\n"
        "try: chunks.take(np.arange(len(chunks)))\n"
        "except UserError as error: print(error)\n"
        f"try: store.{array}[-1]\n"
        "except UserError as error: print(error)",
    )
    assert rows > 1000
    assert said.splitlines() == [f"{path} {CUT}"] * 2, "from chunks and from the store itself"


def test_offsets_that_are_cut_short_while_rows_of_documents_are_taken_are_one_line(world):
    _, path, said = cut_short(
        world,
        "document_offsets",
        "import sys, types, numpy as np\n"
        "from mlm.data.chunks import line_by_line\n"
        "from mlm.errors import UserError\n"
        "store, info = again()['train'], types.SimpleNamespace(pad_id=0, suffix=())\n"
        "chunks = line_by_line(store.ids, store.word_starts, store.document_offsets, 16, info)\n"
        "print(len(chunks), flush=True)\n"
        "sys.stdin.readline()\n"
        "try: chunks.take(np.arange(len(chunks)))\n"
        "except UserError as error: print(error)",
    )
    assert said == f"{path} {CUT}\n"


def test_the_kernel_reads_no_pages_around_those_of_a_chunk(world):
    """Of a large store, reading ahead read 512 times what a batch needs; `rr`: advised to be read at random."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux tells")
    stores = world.prepare()
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text())
    for store in stores.values():
        for array in token_store.ARRAYS:
            [found] = [text for text in mappings if str(getattr(store, array).filename) in text]
            assert "rr" in re.search(r"VmFlags: (.*)", found)[1].split()


def test_a_store_in_a_folder_that_cannot_be_written_is_verified_by_each_run(world, read):
    world.prepare()
    for path in world.folder.glob("*/*/verified.json"):
        path.unlink()
        path.mkdir()  # root may write into any folder
    for _ in range(2):
        read.clear()
        world.prepare()
        assert sorted(read) == ALL_ARRAYS


def test_a_tokenizer_saved_under_another_name_shares_the_store(world, tmp_path):
    world.prepare()
    files = world.files()
    world.tokenizer.save_pretrained(tmp_path / "renamed")
    world.prepare(load_tokenizer(str(tmp_path / "renamed")))
    assert world.files() == files


@pytest.mark.parametrize("change", ["appended", "replaced by as many bytes", "touched"])
def test_a_changed_corpus_is_read_again(change, world):
    world.prepare()
    text = world.train_file.read_text()
    if change == "appended":
        text += "the new fox\n"
    elif change == "replaced by as many bytes":
        text = text.replace("fox", "owl")
    world.train_file.write_text(text)
    documents = [line for line in text.splitlines() if line]
    expected = [tokens_of(world.tokenizer, document) for document in documents]
    assert documents_of(world.prepare()["train"]) == expected
    assert len(world.stores()) == 2


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_a_store(tmp_path):
    world = World(tmp_path, repeat=1000)
    run = world.python("again()")
    try:
        deadline = time.monotonic() + 120
        while not list(world.folder.glob("*.shards/*.building.*")):
            assert run.poll() is None, "it has to be killed before it ends"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        run.kill()
        run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert list(world.folder.glob("*.shards/*.building.*")), "half a shard is left"
    assert not list(world.folder.glob("*/header.json")) + list(world.folder.glob("*/train"))
    assert world.prepare()["train"].header["documents"] == 1000 * len(TEXTS)


MACHINE = socket.gethostname()


def leave_behind(world, days, built_by=""):
    """A build of the world's store that was killed and last wrote so many days ago; its folder."""
    (store,) = world.folder.glob("*/train")
    leftover = world.folder / f"{store.parent.name}.building{built_by}.x1y2"
    shutil.copytree(store, leftover / "store" / "train")
    for path in (leftover, *leftover.rglob("*")):
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    return leftover


@pytest.mark.parametrize("built_by", ["", f".{MACHINE}", ".elsewhere", f".{MACHINE}.elsewhere"])
def test_a_build_removes_what_killed_ones_of_its_store_left(built_by, world):
    world.prepare()
    old, other = (leave_behind(world, 1.1, built_by), world.folder / f"0123456789abcdef.building{built_by}.x1y2")
    shutil.copytree(old, other)
    world.prepare()
    assert old.exists(), "a store that is found is no time to tidy up"
    world.prepare(overwrite_cache=True)
    assert not old.exists()
    assert other.exists(), "another store's build is another's affair"


@pytest.mark.parametrize("built_by", ["", ".elsewhere", f".{MACHINE}.elsewhere"])
@pytest.mark.parametrize("file", [".", "store/train/ids.npy"])
def test_a_build_that_may_be_alive_is_left_alone(file, built_by, world):
    world.prepare()
    alive = leave_behind(world, 1.1, built_by)
    os.utime(alive / file, (time.time() - 0.9 * 24 * 3600,) * 2)
    world.prepare(overwrite_cache=True)
    assert (alive / "store" / "train" / "ids.npy").exists()


@pytest.mark.parametrize("alone", [True, False])
def test_a_build_that_held_the_lock_here_is_dead_when_another_run_holds_it(alone, world):
    world.prepare()
    young = leave_behind(world, 0, f".{MACHINE}")
    if not alone:
        (lock,) = world.folder.glob("*.lock")
        lock.unlink()
        lock.mkdir()  # no lock to be had
    world.prepare(overwrite_cache=True)
    assert young.exists() != alone


def test_a_store_that_is_removed_behind_ones_back_is_one_line(world, monkeypatch):
    def rename(built, folder):
        shutil.rmtree(built) if built.is_dir() else renamed(built, folder)

    renamed = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match=r"--token_store .*: removed .* run again"):
        world.prepare()


@pytest.mark.parametrize("same_place", [True, False])
def test_a_disk_that_is_full_is_one_line_and_harms_nothing(same_place, world):
    world.prepare()
    files = world.files()
    tokenizer = world.tokenizer if same_place else TOKENIZERS["unigram"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes a file, as good as a full disk
    try:
        with pytest.raises(UserError, match=r"--token_store .*: cannot write there \(File too large\)"):
            world.prepare(tokenizer, overwrite_cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert world.files() == files
    assert len(world.stores()) == 1, "what was half-built is gone"


def test_a_run_that_comes_second_uses_the_store_of_the_quicker_one(world, monkeypatch):
    kept = {}

    def load(source):  # while this run reads the corpus, another one begins and ends
        monkeypatch.undo()
        documents = corpus.load(source)
        world.prepare()
        kept.update(world.files())
        return documents

    monkeypatch.setattr(corpus, "load", load)
    stores = world.prepare()
    assert world.files() == kept
    assert documents_of(stores["train"]) == [tokens_of(world.tokenizer, text) for text in TEXTS]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE])
def test_without_locks_in_the_file_system_a_store_is_built_and_a_line_says_so(code, world, monkeypatch, caplog):
    def flock(descriptor, operation):
        if os.fstat(descriptor).st_ino in {path.stat().st_ino for path in world.folder.glob("*.lock")}:
            raise OSError(code, os.strerror(code))
        return real(descriptor, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # a run that was killed leaves nothing that keeps the next one out
        caplog.clear()
        started = time.monotonic()
        assert documents_of(world.prepare(overwrite_cache=True)["train"])
        assert time.monotonic() - started < 20
        [line] = caplog.messages
        assert line.startswith("no locks where ")
        assert line.endswith(f"{os.strerror(code)}): building without one")


def test_colleagues_can_read_a_store(world):
    world.folder.mkdir()
    world.prepare()
    assert {path.stat().st_mode for path in world.stores()} == {world.folder.stat().st_mode}


def test_a_place_that_cannot_be_written_is_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    world.folder = tmp_path / "file" / "stores"
    with pytest.raises(UserError, match=r"--token_store .*file/stores: cannot write there"):
        world.prepare()


def test_a_place_that_cannot_be_looked_into_is_one_line_with_its_flag(world, tmp_path):
    world.folder = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=r"^--token_store .*: cannot write there \(File name too long\)"):
        world.prepare()


def test_stores_lie_in_the_users_cache_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store_folder(TokenStoreConfig()) == tmp_path / "mlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_folder(TokenStoreConfig()) == tmp_path / ".cache" / "mlm"
    assert store_folder(TokenStoreConfig(token_store="~/stores")) == tmp_path / "stores"


@pytest.mark.parametrize("number", [0, -1, 1025, 10**4, 10**30])
def test_a_number_of_workers_that_no_machine_has_is_refused(number):
    with pytest.raises(UserError, match=f"--preprocessing_num_workers {number}"):
        TokenStoreConfig(preprocessing_num_workers=number)
    TokenStoreConfig(preprocessing_num_workers=1024)
