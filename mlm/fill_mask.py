"""What a masked language model would write at the masks of a sentence, with its own probabilities.

The distribution is the model's, over its whole vocabulary: nothing is left out, and masks do not see each
other's fillers. transformers' `pipeline("fill-mask")` gives the same numbers.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from mlm.errors import UserError, at_least, one_line
from mlm.model import ModelConfig, SparseMaskedLM, check_embeddings, load_model, max_positions
from mlm.tokenizer import load_tokenizer

MASK = "[MASK]"  # how a sentence writes a mask, whatever the tokenizer's own mask token is
AT_A_TIME = 32  # sentences in a batch; no figure depends on it
PAGE = 100  # terminal columns that a table may fill


@dataclass(frozen=True)
class FillMaskConfig:
    """Whose fillers to show, and how many."""

    model_name_or_path: str | None = None  # checkpoint that fills the masks, a Hub name or a folder
    compare: str | None = None  # second checkpoint, the base that is shown beside it
    top_k: int = 5  # fillers shown for each mask
    trust_remote_code: bool = False  # run the Python code that a checkpoint brings along

    def __post_init__(self) -> None:
        at_least(self, 1, "top_k")


class Filler(NamedTuple):
    token: str
    probability: float


def load(name: str, trust_remote_code: bool = False) -> tuple[SparseMaskedLM, PreTrainedTokenizerBase]:
    """A checkpoint and its tokenizer, by Hub name or folder, the model on the GPU where there is one.

    Raises UserError where either cannot be loaded or they do not fit each other.
    """
    tokenizer = load_tokenizer(name, trust_remote_code)
    config = ModelConfig(model_name_or_path=name, trust_remote_code=trust_remote_code)
    check_embeddings(config, tokenizer)
    model = load_model(config, tokenizer, seed=0)
    return SparseMaskedLM(model.to("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


@torch.inference_mode()
def fill(
    model: SparseMaskedLM, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], top_k: int
) -> list[list[list[Filler]]]:
    """The `top_k` likeliest fillers of every mask: `[sentence][mask][rank]`, likeliest first.

    A mask is `[MASK]` or the tokenizer's own mask token; each is ranked with the others still in place.

    Raises:
        UserError: a sentence without a mask or longer than the model's position table, a tokenizer without a
            mask token, or `top_k` above the vocabulary.
    """
    vocabulary = model.model.config.get_text_config().vocab_size
    if top_k > vocabulary:
        raise UserError(f"--top_k {top_k}: the model's vocabulary has {vocabulary} tokens")
    ids = _encode(tokenizer, sentences, max_positions(model.model.config))
    was_training = model.training
    model.eval()
    found: list[list[list[Filler]]] = [[] for _ in sentences]

    # Sentences of one length at a time, as padding is not neutral everywhere: ConvBERT's and MobileBERT's
    # convolutions look past the attention mask, and a sentence's fillers would depend on its neighbours.
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for _, same in groupby(by_length, key=lambda i: len(ids[i])):
        rows = list(same)
        for part in (rows[first : first + AT_A_TIME] for first in range(0, len(rows), AT_A_TIME)):
            batch = torch.tensor([ids[i] for i in part])  # [B, T]
            positions = (batch.flatten() == tokenizer.mask_token_id).nonzero().squeeze(1)  # [M]
            logits = model.logits(batch.to(model.model.device), positions.to(model.model.device))  # [M, V]
            best = logits.float().softmax(dim=-1).topk(top_k)  # [M, top_k]
            values, tokens = best.values.tolist(), best.indices.tolist()  # the device synchronises here
            for position, *ranked in zip(positions.tolist(), tokens, values, strict=True):
                fillers = [Filler(_spell(tokenizer, t), p) for t, p in zip(*ranked, strict=True)]
                found[part[position // batch.shape[1]]].append(fillers)
    model.train(was_training)
    return found


def table(sentence: str, names: Sequence[str], fillers: Sequence[list[list[Filler]]]) -> str:
    """What one or two models fill into a sentence, side by side for a person to read in 100 columns.

    Args:
        sentence: printed above them, as it is.
        names: `[model]`, heads of the columns where there are two.
        fillers: `[model][mask][rank]`, as many masks and ranks for each.
    """
    lines = [sentence]
    width = PAGE // len(names) - 4  # of a cell, behind four blanks
    if len(names) > 1:
        # Of a name that is too long the end is kept: folders differ there.
        heads = [name if len(name) <= width else f"…{name[1 - width :]}" for name in names]
        lines.append(_line(heads, width))
    masks = list(zip(*fillers, strict=True))  # [mask][model][rank]
    for number, ranked in enumerate(masks, start=1):
        if len(masks) > 1:
            lines.append(f"  mask {number}")
        for rank in zip(*ranked, strict=True):
            lines.append(_line([f"{filler.probability:.4f}  {filler.token}" for filler in rank], width))
    return "\n".join(lines)


def _encode(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], longest: int | None
) -> list[list[int]]:
    """Ids of each sentence, special tokens around it, at least one mask in it, at most `longest` of them."""
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no mask token; "
            "give the checkpoint of a masked language model"
        )
    # Blanks around the mask stay as they are written: a mask token that takes the blank before it (RoBERTa's,
    # lstrip) does so in the tokenizer.
    texts = [sentence.replace(MASK, tokenizer.mask_token) for sentence in sentences]
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for number, (sentence, row) in enumerate(zip(sentences, ids, strict=True), start=1):
        quoted = f"sentence {number} ({one_line(sentence, 60)!r})"
        if tokenizer.mask_token_id not in row:
            own = "" if tokenizer.mask_token == MASK else f" or {tokenizer.mask_token}"
            raise UserError(f"{quoted} has no mask: write {MASK}{own} where a token is to be filled in")
        if longest is not None and len(row) > longest:
            raise UserError(
                f"{quoted} is {len(row)} tokens long, the model's position table takes {longest}: shorten it"
            )
    return ids


def _spell(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as people read it; as the vocabulary spells it where that is nothing (a blank, a newline)."""
    read = tokenizer.decode([token_id]).strip()
    return read or tokenizer.convert_ids_to_tokens(token_id) or f"id {token_id}"  # embeddings without a token


def _line(cells: Sequence[str], width: int) -> str:
    return "".join(f"    {_fit(cell, width)}" for cell in cells).rstrip()


def _fit(text: str, width: int) -> str:
    """`text` cut or filled to `width` terminal columns, of which East Asian characters take two."""
    kept = ""
    for character in text:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > width:
            break
        kept, width = kept + character, width - columns
    return kept + " " * width
