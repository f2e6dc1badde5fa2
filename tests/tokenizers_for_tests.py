"""Real tokenizers of the three kinds, small, and trained in milliseconds in the manner of known models."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlm.data.tokenizer import train_tokenizer

# Every printable ASCII character as a word, and every letter inside one: no unknown token by accident.
ASCII = " ".join([*map(chr, range(33, 127)), "abcdefghijklmnopqrstuvwxyza", "01234567890"])


def wordpiece(texts: Iterable[str], size: int = 200) -> PreTrainedTokenizerFast:
    """BERT's: `[CLS] a [SEP]`, words by whitespace and punctuation, `##` continues a word."""
    return train_tokenizer([*texts, ASCII], size)


def byte_level_bpe(texts: Iterable[str], size: int = 300) -> PreTrainedTokenizerFast:
    """RoBERTa's: `<s> a </s>`, no unknown token in practice, a mask token that takes the space before it."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", backend.token_to_id("</s>")),
        ("<s>", backend.token_to_id("<s>")),
        trim_offsets=True,
        add_prefix_space=False,
    )
    return _sentencepiece_roles(backend)


def unigram(texts: Iterable[str], size: int = 150) -> PreTrainedTokenizerFast:
    """XLM-R's: `<s> a </s>`, NFKC, words by spaces alone, its special tokens are pieces of the vocabulary."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([*texts, ASCII], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return _sentencepiece_roles(backend)


def _sentencepiece_roles(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
