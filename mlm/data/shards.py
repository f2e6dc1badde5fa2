"""A corpus is tokenised in shards, by as many processes as come: each takes the next one that no other is at.

    <token_store>/<key>.shards/<fingerprint>.shard    the XXH3 of what follows, the arrays of its Parts as .npy

They may be workers of one run, other runs, and other machines that share the folder. A shard, named by what it is made
of (texts, tokenizer, format), is there as a whole or not at all: a build that was killed goes on with those that are.
Once all are there, they are joined in order to the store that is read (token_store.py), and removed."""

import io
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from xxhash import xxh3_128_digest

from mlm.data.cache import build_once, key
from mlm.data.corpus import SPACE, Corpus, ascii_spaced
from mlm.data.encode import Encoder, Piece
from mlm.data.pieces import cut

log = logging.getLogger(__name__)

FORMAT_VERSION = 8  # of shards, and of the store that is made of them
COUNTS = ("words", "characters", "spaced_words", "ns")  # the tokenizer's, code points, as of text.split(), taken
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1_000_000  # whose tokens are held in memory at a time, some 200 bytes a character
WORDS = bytes(code not in SPACE for code in range(256))  # what text becomes, for its words to be counted

Job = tuple[Path, Callable[[Path], None]]  # the place of a shard, and what writes it to a path


class Part(NamedTuple):
    """n tokens of documents in order. The first document may have begun in the part before, the last may go on."""

    ids: np.ndarray  # [n] the smallest unsigned type that holds the vocabulary
    word_starts: np.ndarray  # [n] bool
    ends: np.ndarray  # int64, where in it documents end
    digests: np.ndarray  # uint8, the XXH3 of each text that was read, 16 bytes each
    counts: np.ndarray  # [COUNTS] int64


def tokenise(texts: Iterable[str], encoder: Encoder) -> Iterator[Part]:
    """`texts`, batch by batch, so that memory does not grow with their number."""
    info, began, read = encoder.info, time.perf_counter_ns(), []  # the texts since the last Part

    def batches() -> Iterator[list[Piece]]:
        """Of at most BATCH_DOCUMENTS pieces, and about BATCH_CHARACTERS characters."""
        batch, characters = [], 0
        for text in texts:
            read.append(text)
            for piece in cut(text, encoder.part):
                batch.append(piece)
                characters += len(piece[0])
                if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch

    for ids, word_starts, ends in encoder.batches(batches()):
        digests = np.frombuffer(b"".join(xxh3_128_digest(text.encode()) for text in read), np.uint8)
        data, size = b" ".join(map(ascii_spaced, read)), BATCH_CHARACTERS  # in parts, as one text may be large
        inside = (np.frombuffer(data[i : i + size + 1].translate(WORDS), np.bool_) for i in range(0, len(data), size))
        spaced = sum(np.count_nonzero(part[1:] > part[:-1]) for part in inside) + sum(WORDS[code] for code in data[:1])
        words = np.count_nonzero(word_starts & info.maskable[ids])
        counts = np.array([words, sum(map(len, read)), spaced, time.perf_counter_ns() - began])
        yield Part(ids.astype(np.min_scalar_type(info.size - 1)), word_starts, ends, digests, counts)
        read.clear()
        began = time.perf_counter_ns()


def build_shards(
    corpus: Corpus, splits: list[str], encoder: Encoder, processes: int, folder: Path
) -> dict[str, list[Job]]:
    """Builds the shards that `folder` lacks, in so many processes, beside other runs, which may still be at some when
    it returns the shards of each split, in order. Raises UserError as tokenising and writing do."""
    shards: dict[str, list[Job]] = {split: [] for split in splits}
    for split, made in shards.items():
        for documents, texts in corpus.shards[split]:
            name = key([FORMAT_VERSION, encoder.info.fingerprint, corpus.splits[split].strip_html, texts])
            made.append((folder / f"{name}.shard", partial(_write_shard, corpus, split, documents, encoder)))
    jobs, workers = [job for made in shards.values() for job in made], []
    with suppress(OSError):  # which is said where the store itself cannot be written
        folder.mkdir(parents=True, exist_ok=True)
    try:
        fork = multiprocessing.get_context("fork").Process  # at once, with the corpus and the tokenizer
        for _ in range(min(processes, sum(not os.path.exists(place) for place, _ in jobs)) - 1):
            (worker := fork(target=_work, args=(jobs, os.getpid()), daemon=True)).start()
            workers.append(worker)
        for _ in tqdm(_take(jobs), "tokenising", len(jobs), leave=False, unit=" shards", disable=None):
            pass
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()
    if killed := [worker.exitcode for worker in workers if worker.exitcode]:
        log.warning("%d of %d tokenising processes were killed (%s)", len(killed), len(workers) + 1, killed)
    return shards


def read_shards(jobs: list[Job]) -> Iterator[Part]:
    """What is in the shards, in order; one that is missing or damaged is built."""
    for place, write in jobs:
        yield from build_once(place, partial(_read_shard, place), write)


def _take(jobs: list[Job]) -> Iterator[None]:
    """Builds what is missing and no other process is at; yields after each shard, built or not."""
    for place, write in jobs:
        build_once(place, partial(_settled, place), write, wait=False)
        yield


def _settled(place: Path) -> bool:
    """Whether a shard is there, or even its folder is not: then the store is."""
    return os.path.exists(place) or not os.path.isdir(place.parent)


def _work(jobs: list[Job], parent: int) -> None:
    """A worker's life, over soon after its parent's. What fails is left to the parent, which will say why."""
    with suppress(BaseException):
        for _ in _take(jobs):
            if os.getppid() != parent:
                return


def _write_shard(corpus: Corpus, split: str, documents: range, encoder: Encoder, path: Path) -> None:
    texts, file = corpus.splits[split][documents.start : documents.stop], io.BytesIO()
    for array in (array for part in tokenise(texts, encoder) for array in part):
        np.save(file, array)
    path.write_bytes(xxh3_128_digest(file.getbuffer()) + file.getbuffer())


def _read_shard(path: Path) -> list[Part]:
    """The parts of a shard; none where it is missing or damaged."""
    try:
        file = io.BytesIO(path.read_bytes())
        if file.read(16) != xxh3_128_digest(file.getbuffer()[16:]):
            raise ValueError("not what was written")
        arrays = []
        while file.tell() < len(file.getbuffer()):
            arrays.append(np.load(file))
        return [Part(*part) for part in zip(*[iter(arrays)] * len(Part._fields), strict=True)]
    except (OSError, ValueError):
        if os.path.exists(path):
            log.warning("%s is damaged; building it anew", path)
            path.unlink()
        return []
