"""Adds words of a domain to a checkpoint's vocabulary: a checkpoint in, a checkpoint out, before any training.

    python scripts/extend_vocabulary.py --model_name_or_path MODEL --train_file reviews.csv --output_dir extended
    python scripts/train.py --model_name_or_path extended --train_file reviews.csv …

The words of the training split that take the most pieces more than one become tokens, until there are enough of them,
those that are left stand less often than --min_count, or the text has as few pieces a word as --fragment_score says
(AVocaDo: Hong et al., EMNLP 2021; a mark of punctuation counts as a word). A word's row, in the embeddings and
wherever the head has one, starts as the mean of its pieces' (IndoBERTweet: Koto et al., EMNLP 2021). All other text
keeps its tokens:

    WordPiece        a word becomes an added token, found where no letter, digit or underscore touches it: in "fox€" as
                     well, which BERT takes for one word, so that the € is cut as a word of its own there. In the
                     model's vocabulary "fox" would also begin "foxes", in place of pieces that the model knows there.
    byte-level BPE   a word becomes an entry of the vocabulary, which `ignore_merges` takes whole or not at all. The
                     blank before a word belongs to it, so that " fox" and "fox" are two words.

Words are runs of letters, marks and digits among what the tokenizer's own normaliser and pre-tokenizer make of the
text. One with an unknown piece stays as it is: nothing that its row could start from is known of it.
"""

import json
import math
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from startup import quick_imports

with quick_imports():
    import torch
    from terminal import PAGE, fit
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mlm import cli
    from mlm.data import corpus
    from mlm.data.corpus import CorpusConfig
    from mlm.data.encode import encode_texts
    from mlm.data.tokenizer import explained, load_tokenizer, tokenizer_info
    from mlm.errors import UserError, at_least, at_most, printable
    from mlm.files import write_json
    from mlm.model.load import ModelConfig, load_model
    from mlm.model.sparse_head import seeded_cpu_generator
    from mlm.model.vocabulary import enlarge, vocab_size

PARTIAL = ".partial"  # where a checkpoint is until it is whole; what a killed run left there is removed
SHOWN = 20  # words, on a terminal and in the last line of output
WHOLE = {"WordPiece": "BertPreTokenizer", "BPE": "ByteLevel"}  # models, with the pre-tokenizer that finds their words


@dataclass(frozen=True)
class ExtensionConfig:
    """Which checkpoint is extended, by which words, and where it is saved."""

    model_name_or_path: str | None = None  # Extend the vocabulary of this checkpoint, a Hub name or a folder.
    output_dir: str | None = None  # Save the extended checkpoint in this folder, which is new or empty.
    vocabulary_extension: int = 1000  # Add this many words, or as many as there are.
    min_count: int = 10  # Add no word that stands less often in the training split.
    fragment_score: float = 1.0  # Stop where the text has so many pieces a word, or fewer (1: no limit).
    trust_remote_code: bool = False  # Run the Python code that a checkpoint brings along.

    def __post_init__(self) -> None:
        at_least(self, 1, "vocabulary_extension", "min_count", "fragment_score")
        at_most(self, 10**6, "vocabulary_extension")


class Word(NamedTuple):
    token: str  # as the vocabulary spells it
    count: int
    pieces: tuple[str, ...]

    @property
    def saved(self) -> int:
        """Pieces that a token for the word saves."""
        return self.count * (len(self.pieces) - 1)


def main(argv: Sequence[str]) -> dict[str, Any]:
    what, source, _ = cli.parse((ExtensionConfig, CorpusConfig), argv, cli.command(__doc__))
    return extend(what, source)


def extend(what: ExtensionConfig, source: CorpusConfig) -> dict[str, Any]:
    """Writes the extended checkpoint, and returns what came of it. Raises UserError where there is no text, no word to
    add, or a tokenizer or model that takes none; then nothing is written."""
    if not (what.model_name_or_path and what.output_dir):
        raise UserError("give the checkpoint to extend, --model_name_or_path, and where to save it, --output_dir")
    folder = Path(what.output_dir)
    corpus.keep_apart(source, "--output_dir", folder)
    partial = folder / PARTIAL  # in the folder: its parent may be no place to write, or on another file system
    if os.path.lexists(folder) and not (folder.is_dir() and not set(folder.iterdir()) - {partial}):
        raise UserError(f"--output_dir {folder}: name a new or an empty folder")
    tokenizer = load_tokenizer(what.model_name_or_path, what.trust_remote_code)
    check_kind(tokenizer)
    splits = corpus.load(source).splits
    if "train" not in splits:
        raise UserError("no training text to find words in: give --train_file")
    with explained(tokenizer):
        words, pieces = find_words(splits["train"], tokenizer, what)
    model = load_model(ModelConfig(what.model_name_or_path, trust_remote_code=what.trust_remote_code), tokenizer, 0)
    extend_model(model, [tokenizer.convert_tokens_to_ids(list(word.pieces)) for word in words], vocab_size(tokenizer))
    is_new = not folder.exists()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(model, partial)
        extended = extend_tokenizer(tokenizer, [word.token for word in words], partial, what.trust_remote_code)
        tokens = {name: compare_lengths(texts, tokenizer, extended) for name, texts in splits.items()}
        listed = [{"word": spelt(tokenizer, word.token), **word._asdict(), "saved": word.saved} for word in words]
        result = {"min_count": what.min_count, "fragment_score": what.fragment_score, "pieces_a_word": pieces}
        result |= {"tokens": tokens, "words": listed}
        write_json(partial / "vocabulary_extension.json", result)
        mode = (partial / "config.json").stat().st_mode  # safetensors gives its files to their owner alone
        # The configuration last: without it there is no model.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(mode)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: the checkpoint is there
                folder.rmdir()
    first = [word["word"] for word in listed[:SHOWN]]
    return {"output_dir": str(folder), **result, "words": len(words), "first_words": first}


def check_kind(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where no way is known to add a word to `tokenizer` that leaves all other text as it is."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    kind, name = state["model"].get("type"), tokenizer.name_or_path
    steps = state.get("pre_tokenizer") or {}
    if kind not in WHOLE or WHOLE[kind] not in [step["type"] for step in (steps, *steps.get("pretokenizers", ()))]:
        known = "BERT's WordPiece and byte-level BPE (RoBERTa, ModernBERT)"
        raise UserError(f"{name}: words are added to vocabularies of {known}, not of {kind or 'slow tokenizers'}")
    if kind == "BPE" and not state["model"].get("ignore_merges"):
        cut = tokenizer.backend_tokenizer.model.tokenize
        special = {token["content"] for token in state["added_tokens"]}
        changed = [t for t in state["model"]["vocab"] if t not in special and [p.value for p in cut(t)] != [t]]
        if changed:  # none in GPT-2's vocabulary, which is RoBERTa's
            unreached = f"merges do not reach {len(changed)} of its tokens, as {changed[0]!r}"
            raise UserError(f"{name}: {unreached}, which as whole words would be cut otherwise")


def find_words(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, what: ExtensionConfig
) -> tuple[list[Word], dict[str, float]]:
    """The words to add, see `choose`, and the pieces a word of the text, {"before": …, "after": …}, as if each new
    word were found wherever the pre-tokenizer has it. Raises UserError where there is none to add."""
    engine, known, least = tokenizer.backend_tokenizer, tokenizer.get_vocab(), what.min_count
    normalise = engine.normalizer.normalize_str if engine.normalizer else str
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in engine.pre_tokenizer.pre_tokenize_str(normalise(text)))
    cut = {word: tuple(piece.value for piece in engine.model.tokenize(word)) for word in counts}
    new = {w: n for w, n in counts.items() if n >= least and w not in known and is_word(spelt(tokenizer, w))}
    new = {word: n for word, n in new.items() if tokenizer.unk_token not in cut[word]}
    total, pieces = max(counts.total(), 1), sum(n * len(cut[word]) for word, n in counts.items())
    to_save = pieces - round(what.fragment_score * total, 6)  # 1.15 · 20 is 22.999… in floating point
    if what.fragment_score > 1 and to_save <= 0:
        found = f"the text has {pieces / total:.4g} pieces a word as it is"
        raise UserError(f"--fragment_score {what.fragment_score}: {found}")
    words = choose(new, cut.__getitem__, what.vocabulary_extension, to_save)
    if not words:
        seldom = f"no word that stands {least} times in the training split is cut into pieces that are all known"
        raise UserError(f"{seldom}: there is none to add (--min_count)")
    return words, {"before": pieces / total, "after": (pieces - sum(word.saved for word in words)) / total}


def choose(
    counts: Mapping[str, int], cut: Callable[[str], Sequence[str]], number: int, to_save: float = math.inf
) -> list[Word]:
    """The `number` words that save the most pieces, count · (pieces − 1), the most first; of those that save as many,
    the ones that come first in the order of their spelling. A word of one piece, or of none, saves none. No
    word is taken once those before it save `to_save` pieces.

    counts: how often each word stands in the text; cut: word -> its pieces"""
    words = [Word(word, count, tuple(cut(word))) for word, count in counts.items()]
    words = sorted((word for word in words if word.saved > 0), key=lambda word: (-word.saved, word.token))[:number]
    saved = accumulate((word.saved for word in words), initial=0)  # by the words before each
    return [word for word, before in zip(words, saved, strict=False) if before < to_save]


def is_word(text: str) -> bool:
    """Whether `text`, but for a blank before it, is letters, marks and digits: all word characters to tokenizers."""
    kinds = {unicodedata.category(character) for character in text.removeprefix(" ")}
    return bool(kinds) and all(kind[0] in "LM" or kind == "Nd" for kind in kinds)


def spelt(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    """A word of the pre-tokenizer as text; byte-level ones are spelt in letters that stand for bytes."""
    engine = tokenizer.backend_tokenizer
    return engine.decoder.decode([word]) if type(engine.model).__name__ == "BPE" else word


def extend_model(model: PreTrainedModel, pieces: Sequence[Sequence[int]], first: int) -> None:
    """Gives the tokens first, first + 1, … the mean of their pieces' rows, in each tensor that has a row for a token:
    the embeddings, the head's own where it is not tied to them, and its bias.

    The table grows by as many rows as there are words, also one that had rows to spare: so it is seen which dimensions
    are the vocabulary's. Raises UserError where the architecture cannot grow."""
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with seeded_cpu_generator(0):  # for the rows to spare, which no token has
        enlarge(model, len(model.get_input_embeddings().weight) + len(pieces))
    for name, tensor in model.state_dict().items():
        for dimension, (old, new) in enumerate(zip(before[name], tensor.shape, strict=True)):
            if old != new:
                rows = tensor.movedim(dimension, 0)
                rows[first : first + len(pieces)] = torch.stack([rows[own].mean(0) for own in map(list, pieces)])


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Raises UserError where transformers would not load all of it again: an enlarged BERT whose head is not tied to
    its embeddings is saved with one bias for the head's two."""
    model.save_pretrained(folder)
    _, loading = type(model).from_pretrained(folder, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{type(model).__name__}: transformers saves it without its {', '.join(missing)}")


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, words: list[str], folder: Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Saves the tokenizer with `words` as its next tokens in `folder`, and loads it from there. `tokenizer` stays as
    it is. Raises UserError where they do not get the ids that follow its last one."""
    first = vocab_size(tokenizer)
    tokenizer.save_pretrained(folder)
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        extended = load_tokenizer(str(folder), trust_remote_code)
        extended.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
        extended.save_pretrained(folder)
    else:
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = state["model"]["vocab"]
        for token in state["added_tokens"]:  # one outside the vocabulary gets the first id after it when it is loaded
            vocabulary.setdefault(token["content"], token["id"])
        vocabulary |= {word: first + i for i, word in enumerate(words)}
        state["model"]["ignore_merges"] = True
        Tokenizer.from_str(json.dumps(state)).save(str(folder / "tokenizer.json"))
        # RoBERTa's class would make the model anew from vocabulary and merges; this one takes the file as it is.
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        write_json(folder / "tokenizer_config.json", settings)
    extended = load_tokenizer(str(folder), trust_remote_code)
    if extended.convert_tokens_to_ids(words) != list(range(first, first + len(words))):
        raise UserError(f"{tokenizer.name_or_path}: its tokens have ids with gaps, and new ones would fall into them")
    return extended


def compare_lengths(
    texts: Iterable[str], base: PreTrainedTokenizerBase, extended: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The tokens of a split before and after, as its token stores have them."""
    before, after = (sum(map(len, encode_texts(texts, t, tokenizer_info(t)))) for t in (base, extended))
    return {"before": before, "after": after, "saved_share": 1 - after / max(before, 1)}


def table(result: dict[str, Any]) -> str:
    """For a person on a terminal: which words came in, and what they save."""
    lines = [f"{result['words']:,} words are tokens now: {' '.join(word.strip() for word in result['first_words'])} …"]
    pieces = result["pieces_a_word"]
    lines.append(f"pieces a word in the training text: {pieces['before']:.4g} before, {pieces['after']:.4g} after")
    for split, tokens in result["tokens"].items():
        saved = f"{tokens['saved_share']:.2%}"
        lines.append(f"{split:<12}{tokens['before']:>14,} tokens before, {tokens['after']:>14,} after, {saved} saved")
    lines.append(f"all of them: {result['output_dir']}/vocabulary_extension.json")
    return printable("\n".join(fit(line, PAGE).rstrip() for line in lines[:1]) + "\n" + "\n".join(lines[1:]))


if __name__ == "__main__":
    cli.run(main, table)
