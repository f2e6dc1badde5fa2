"""scripts/extend_vocabulary.py: the words that save most become tokens, and all other text keeps its own."""

import json
import math
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from benchmarks.speedrun import run
from mlm import cli
from mlm.data.corpus import CorpusConfig
from mlm.errors import UserError
from mlm.report.report import write_report
from mlm.report.run_record import read_object, read_runs
from mlm.train import train
from tests.scripts import load_script
from tests.tokenizers_for_tests import byte_level_bpe, unigram, wordpiece

script = load_script("extend_vocabulary")
TEXT = ["the old cat likes milk every day", "a young dog, a small dog"]
NEW = ["zorglub", "foxes", "zug"]  # of several pieces to a tokenizer of TEXT
# What stands around words: punctuation, blanks, letters that they are a part of then, accents, capitals, CJK.
AROUND = [" ", "  ", ".", ",", "'", "(", ")", "-", "\n", "s", "a", "É", "字", "3", "_", "the", " cat ", "fox", "zorg"]


def kinds():
    return {"WordPiece": wordpiece([*TEXT, "É字"], 200), "BPE": byte_level_bpe(TEXT, 300)}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """{kind: (tokenizer, the same with NEW as words)}; byte-level ones have them with a blank before them, too."""
    found = {}
    for kind, tokenizer in kinds().items():
        words = NEW if kind == "WordPiece" else [f"{blank}{word}" for word in NEW for blank in ("", "Ġ")]
        found[kind] = tokenizer, script.extend_tokenizer(tokenizer, words, tmp_path_factory.mktemp(kind))
    return found


def test_the_words_that_save_the_most_pieces_are_chosen():
    counts = {"the": 90, "foxes": 10, "zorglub": 6, "owls": 12, "bees": 12}
    pieces = {"the": ["the"], "foxes": ["fox", "##es"], "zorglub": ["z", "##org", "##lub"], "owls": ["owl", "##s"]}
    pieces["bees"] = ["bee", "##s"]
    chosen = script.choose(counts, pieces.get, 3)
    # zorglub saves 6 · 2 pieces, bees and owls 12 · 1 each, in the order of their spelling; foxes would save 10.
    assert [(word.token, word.saved) for word in chosen] == [("bees", 12), ("owls", 12), ("zorglub", 12)]
    assert [word.token for word in script.choose(counts, pieces.get, 9)] == ["bees", "owls", "zorglub", "foxes"]
    for to_save, number in ((0, 0), (1, 1), (12, 1), (13, 2), (36, 3), (37, 4)):  # 12, 24, 36 and 46 are saved
        assert len(script.choose(counts, pieces.get, 9, to_save)) == number


def pretokens(tokenizer, text):
    """The words of a text and their pieces, one by one: slow and obvious."""
    engine = tokenizer.backend_tokenizer
    normal = engine.normalizer.normalize_str(text) if engine.normalizer else text
    for word, (start, end) in engine.pre_tokenizer.pre_tokenize_str(normal):
        apart = "_" not in (normal[start - 1 : start], normal[end : end + 1])  # to BERT a mark, to others a letter
        yield word, [piece.value for piece in engine.model.tokenize(word)], apart or engine.normalizer is None


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
@given(parts=st.lists(st.sampled_from([*NEW, "Zorglub", "FOXES", *AROUND]), max_size=12))
def test_each_new_word_is_one_token_and_all_else_is_cut_as_before(both, kind, parts):
    base, extended = both[kind]
    text, new = "".join(parts), set(extended.get_vocab()) - set(base.get_vocab())
    expected, words = [], []
    for number, (word, pieces, apart) in enumerate(pretokens(base, text)):
        own = [word] if word in new and apart else pieces
        expected += own
        words += [number] * len(own)
    encoded = extended(text, add_special_tokens=False)
    assert encoded.tokens() == expected
    starts = Counter(encoded.word_ids())
    assert list(starts.values()) == list(Counter(words).values()), "words are the tokenizer's own"


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
@given(text=st.text(max_size=40))
def test_text_without_a_new_word_is_tokenised_as_before(both, kind, text):
    base, extended = both[kind]
    assert extended(text)["input_ids"] == base(text)["input_ids"]
    assert extended(text).word_ids() == base(text).word_ids()


def test_a_word_next_to_an_underscore_stays_in_pieces(both):
    base, extended = both["WordPiece"]
    assert extended.tokenize("_foxes_ foxes") == [*base.tokenize("_foxes_"), "foxes"]


def corpus_file(tmp_path, *texts):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def extend(checkpoint, tmp_path, texts, **flags):
    flags = {"min_count": 2, "output_dir": tmp_path / "extended", "validation_split_percentage": 30, **flags}
    flags = {"model_name_or_path": checkpoint, "train_file": corpus_file(tmp_path, *texts), **flags}
    return script.main([f"--{name}={value}" for name, value in flags.items()])


TEXTS = [f"the old zorglub likes {'grumpf, ' * (n % 3)}milk every day and night {n}" for n in range(40)]


def test_only_the_training_split_is_counted(toy, tmp_path):
    source = CorpusConfig(train_file=str(corpus_file(tmp_path, *TEXTS)), validation_split_percentage=30)
    documents = list(script.corpus.load(source).splits["train"])
    result = extend(toy.checkpoint, tmp_path, TEXTS)
    written = json.loads((tmp_path / "extended" / "vocabulary_extension.json").read_text())["words"]
    count = {word["word"]: word["count"] for word in written}
    assert 0 < len(documents) < len(TEXTS) and count["zorglub"] == len(documents)
    assert count["grumpf"] == sum(document.count("grumpf") for document in documents)
    train_tokens = result["tokens"]["train"]
    assert train_tokens["before"] - train_tokens["after"] == sum(word["saved"] for word in written)
    assert result["tokens"]["validation"]["saved_share"] > 0
    assert result["words"] == len(written) and result["first_words"] == [word["word"] for word in written]


def test_a_word_has_to_stand_min_count_times(toy, tmp_path):
    found = extend(toy.checkpoint, tmp_path, [*TEXTS, "wumpus", "wumpus a"], min_count=5, allow_leaks=True)
    assert "zorglub" in found["first_words"] and "wumpus" not in found["first_words"]


def test_words_are_added_until_the_text_has_so_many_pieces_a_word(toy, tmp_path):
    """AVocaDo's fragment score, counted slowly."""
    source = CorpusConfig(train_file=str(corpus_file(tmp_path, *TEXTS)), validation_split_percentage=30)
    documents = list(script.corpus.load(source).splits["train"])
    tokenizer = AutoTokenizer.from_pretrained(toy.checkpoint)
    words = [(word, pieces) for text in documents for word, pieces, _ in pretokens(tokenizer, text)]

    def score(new):
        return sum(1 if word in new else len(pieces) for word, pieces in words) / len(words)

    for bound in (1.0, 1.3, 1.5):
        found = extend(toy.checkpoint, tmp_path, TEXTS, fragment_score=bound, output_dir=tmp_path / str(bound))
        written = json.loads((tmp_path / str(bound) / "vocabulary_extension.json").read_text())
        added = [word["token"] for word in written["words"]]
        assert written["fragment_score"] == bound
        assert found["pieces_a_word"] == pytest.approx({"before": score([]), "after": score(added)})
        assert score(added[:-1]) > bound and (score(added) <= bound or bound == 1)
    with pytest.raises(UserError, match=r"--fragment_score 9.0: the text has [\d.]+ pieces a word as it is"):
        extend(toy.checkpoint, tmp_path, TEXTS, fragment_score=9)


def test_a_word_with_an_unknown_letter_is_left_out(toy, tmp_path):
    found = extend(toy.checkpoint, tmp_path, [f"{text} жук" for text in TEXTS])
    assert "zorglub" in found["first_words"] and "жук" not in found["first_words"]


def distilbert(toy, folder, tied):
    tokenizer = AutoTokenizer.from_pretrained(toy.checkpoint)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "tie_word_embeddings": tied}
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **sizes))
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_the_means_of_the_pieces_and_all_others_stay(toy, tmp_path, tied):
    checkpoint = distilbert(toy, tmp_path / "base", tied)
    extend(checkpoint, tmp_path, TEXTS)
    before, after = (AutoModelForMaskedLM.from_pretrained(f) for f in (checkpoint, tmp_path / "extended"))
    base, extended = (AutoTokenizer.from_pretrained(f) for f in (checkpoint, tmp_path / "extended"))
    word, pieces = extended.convert_tokens_to_ids("zorglub"), base("zorglub", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    shared = after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert shared == tied
    for table in (
        lambda model: model.get_input_embeddings().weight,
        lambda model: model.get_output_embeddings().weight,
        lambda model: model.get_output_embeddings().bias,
    ):
        old, new = table(before), table(after)
        assert torch.equal(new[: len(base)], old[: len(base)])
        torch.testing.assert_close(new[word], old[pieces].mean(0))


def test_a_model_that_would_not_be_saved_whole_is_refused(toy, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(toy.checkpoint).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"without its cls\.predictions\.decoder\.bias"):
        extend(tmp_path / "base", tmp_path, TEXTS)
    assert not {path.name for path in tmp_path.iterdir()} - {"base", "text.jsonl"}


def test_bits_per_character_compare_an_extended_model_with_its_base(toy, tmp_path):
    """Before any training it is no better, and not much worse: each new word's logit is the mean of its pieces'."""
    extend(toy.checkpoint, tmp_path, TEXTS)
    files = {"model_name_or_path": tmp_path / "extended", "compare": toy.checkpoint, "max_seq_length": 16}
    files |= {"validation_file": tmp_path / "text.jsonl", "token_store": tmp_path / "stores"}
    found = load_script("evaluate").main([f"--{name}={value}" for name, value in files.items()])
    assert not found["same_tokenizer"]
    assert 0 < found["bits_per_character"] < 2 * found["bits_per_character_before"]


def test_a_word_takes_a_spare_row_of_a_table_that_has_some(toy, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    rows = len(model.get_input_embeddings().weight) + 64
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(toy.checkpoint).save_pretrained(tmp_path / "padded")
    added = extend(tmp_path / "padded", tmp_path, TEXTS)["words"]
    extended = AutoTokenizer.from_pretrained(tmp_path / "extended")
    table = AutoModelForMaskedLM.from_pretrained(tmp_path / "extended").get_input_embeddings().weight
    pieces = AutoTokenizer.from_pretrained(toy.checkpoint)("zorglub", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(table[extended.convert_tokens_to_ids("zorglub")], table[pieces].mean(0))
    assert len(table) == rows + added


ALONE = """
import sys
from transformers import AutoTokenizer, pipeline
for folder in sys.argv[2:]:
    fill = pipeline("fill-mask", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [word] = [token for token in tokenizer.tokenize(sys.argv[1]) if "zorglub" in token]
    [found] = fill(f"the old {tokenizer.mask_token} likes milk", targets=[word])
    print([tokenizer.tokenize(sys.argv[1]), found["token_str"]])
assert "mlm" not in sys.modules
"""


def roberta(folder):
    """A checkpoint whose tokenizer has the class that makes its model anew from vocabulary and merges."""
    model = byte_level_bpe(TEXT, 300).backend_tokenizer
    state = json.loads(model.to_str())["model"]
    tokenizer = RobertaTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def test_stock_transformers_alone_segments_as_the_trained_model_saw_it(toy, tmp_path):
    """What the script saves, and what a run from there does."""
    text, folders, expected = "a zorglub, zorglubs", [], []
    for name, base, word in (("bert", toy.checkpoint, "zorglub"), ("roberta", roberta(tmp_path / "base"), " zorglub")):
        extended, trained = tmp_path / name, tmp_path / f"{name}-run"
        extend(base, tmp_path, TEXTS, output_dir=extended)
        settings = {"train_file": str(tmp_path / "text.jsonl"), "validation_file": None, "eval_on_start": False}
        settings |= {"model_name_or_path": str(extended), "max_train_steps": 2}
        pieces = train(toy.config(trained, **settings)).tokenizer.tokenize(text)
        assert sum("zorglub" in piece for piece in pieces) == 1
        folders += [extended, trained]
        expected += 2 * [str([pieces, word])]
    command = [sys.executable, "-c", ALONE, text, *folders]
    ran = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
    assert ran.stdout.splitlines() == expected, ran.stderr
    write_report(read_runs([tmp_path / "bert-run"]), tmp_path / "page.html")
    saved = read_object(tmp_path / "bert" / "vocabulary_extension.json")["tokens"]["train"]["saved_share"]
    page = (tmp_path / "page.html").read_text()
    assert f"4 words added, {saved:.1%} of the training split's tokens saved" in page and ": zorglub grumpf " in page


def test_a_speedrun_recipe_with_more_words_counts_nats_over_the_tokens_of_the_base(toy, tmp_path, monkeypatch):
    """A model without a clue pays ln V for each token that it has, so that its loss shows how they are counted."""
    files = {"model_name_or_path": str(toy.checkpoint)}
    texts = {"train_file": TEXTS, "validation_file": TEXTS[:9], "dev_file": TEXTS[20:29]}
    texts = {name: [f"{text} {name}" for text in own] for name, own in texts.items()}  # none stands in two
    for name, own in texts.items():
        files[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"text": own}), files[name])
    # Rows of documents are how this one trains; it is measured on the chunks that all are measured on.
    (tmp_path / "more.yaml").write_text("vocabulary_extension: 3\ntrain_batch_size: 8\nline_by_line: true\n")
    monkeypatch.setattr(run, "RECIPES", tmp_path)
    monkeypatch.setattr(run, "LENGTH", 16)
    job = run.Job("toy", 1, "more", 1, files, tmp_path, test=True)
    config = cli.parse_config(run.loop.Config, run.flags("more", {**run.inputs(job), "token_store": tmp_path / "s"}))
    assert config.model.model_name_or_path == str(tmp_path / "extended-3")
    model = AutoModelForMaskedLM.from_pretrained(config.model.model_name_or_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    cut, make = [], run.open_eval_sets
    monkeypatch.setattr(run, "open_eval_sets", lambda *given: cut.append(make(*given)) or cut[-1])
    found = run.measure(config, job, model)
    assert all(own.chunks.document_offsets is None for sets in cut for own in sets.values())
    base, extended = (AutoTokenizer.from_pretrained(f) for f in (toy.checkpoint, tmp_path / "extended-3"))
    for figure, name in (("loss", "validation_file"), ("dev_loss", "dev_file")):
        its, mine = (sum(len(t.tokenize(text)) for text in texts[name]) for t in (base, extended))
        assert mine < its
        assert found[figure] == pytest.approx(math.log(model.config.vocab_size) * mine / its)


def test_an_extended_checkpoint_is_extended_again_by_other_words(toy, tmp_path):
    extend(toy.checkpoint, tmp_path, TEXTS, vocabulary_extension=1)
    more = {"output_dir": tmp_path / "twice", "model_name_or_path": tmp_path / "extended"}
    assert "zorglub" not in extend(None, tmp_path, TEXTS, **more)["first_words"]
    assert "zorglub" in AutoTokenizer.from_pretrained(tmp_path / "twice").tokenize("the zorglub")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"min_count": 1000}, "no word that stands 1000 times"),
        ({"vocabulary_extension": 0}, "--vocabulary_extension 0: at least 1"),
        ({"train_file": None}, "give --train_file"),
        ({"output_dir": None}, "give the checkpoint to extend"),
    ],
)
def test_what_gives_no_checkpoint_is_refused_in_one_line_and_writes_nothing(toy, tmp_path, flags, reason):
    held_out = {"validation_file": corpus_file(tmp_path, *TEXTS)} if "train_file" in flags else {}
    with pytest.raises(UserError, match=reason):
        extend(toy.checkpoint, tmp_path, TEXTS, **{**flags, **held_out})
    assert [path.name for path in tmp_path.iterdir()] in ([], ["text.jsonl"])


def test_a_folder_that_holds_something_is_not_touched(toy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(UserError, match="name a new or an empty folder"):
        extend(toy.checkpoint, tmp_path, TEXTS, output_dir=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_an_empty_folder_is_filled_and_those_beside_it_are_not_touched(toy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes").write_text("")
    extend(toy.checkpoint, tmp_path, TEXTS, output_dir=tmp_path / "mine")
    assert "zorglub" in AutoTokenizer.from_pretrained(tmp_path / "mine").tokenize("the zorglub")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "mine.partial", "text.jsonl"}
    assert (tmp_path / "mine.partial" / "notes").exists()


@pytest.mark.parametrize("output_dir", [".", "link"])
def test_an_empty_folder_that_cannot_be_replaced_takes_a_checkpoint(toy, tmp_path, monkeypatch, output_dir):
    """The current folder, the target of a link; a mounted volume likewise."""
    here, beside = tmp_path / "here", tmp_path / "beside"
    (here / ".partial").mkdir(parents=True)  # a run was killed
    beside.mkdir()
    (beside / "link").symlink_to(here)
    monkeypatch.chdir(here if output_dir == "." else beside)
    extend(toy.checkpoint, tmp_path, TEXTS, output_dir=output_dir)
    tokenizer, model = AutoTokenizer.from_pretrained(here), AutoModelForMaskedLM.from_pretrained(here)
    assert tokenizer.convert_tokens_to_ids("zorglub") < model.config.vocab_size
    assert tokenizer.tokenize("zorglub") == ["zorglub"]
    assert not (here / ".partial").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "here", "text.jsonl"]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    unigram(TEXT).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="not of Unigram"):
        extend(tmp_path / "base", tmp_path, TEXTS)


def test_tokens_that_merges_do_not_reach_are_not_let_loose():
    tokenizer = byte_level_bpe(TEXT, 300)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["qqq"] = len(state["model"]["vocab"])
    changed = type(tokenizer)(tokenizer_object=script.Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(UserError, match="do not reach 1 of its tokens, as 'qqq'"):
        script.check_kind(changed)
