"""Text that training mixes into the domain's, each source in a share of its own: general text, against forgetting."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlm.data.corpus import Files, several
from mlm.data.token_store import TokenStore, prepare
from mlm.data.tokenizer import TokenizerInfo
from mlm.errors import UserError

FINEST = 10**9  # shares are multiples of one over it


@dataclass(frozen=True)
class ReplayConfig:
    """Text that is mixed into training, such as general text, so that less of it is forgotten."""

    replay_file: Files = None  # Train on this text too, in the formats of --train_file; none of it is held out.
    replay_share: float | tuple[float, ...] = 0.1  # Take this share of all chunks from it (or one from each file).
    replay_text_column: str | None = None  # This column holds its documents (default: --text_column).

    def __post_init__(self) -> None:
        files, shares = several(self.replay_file), several(self.replay_share)
        if not (min(shares) >= 1 / FINEST and sum(shares) <= 1 - 1 / FINEST):
            raise UserError(f"--replay_share {self.replay_share}: more than 0 each, and less than 1 together")
        if files and len(shares) not in (1, len(files)):
            raise UserError(f"--replay_share: {len(shares)} shares of {len(files)} files; give one, or one for each")

    @property
    def shares(self) -> dict[str, Fraction]:
        """The sources by name, and which share of all chunks each has."""
        shares = [Fraction(round(share * FINEST), FINEST) for share in several(self.replay_share)]
        names = [f"replay_{number}" for number, _ in enumerate(shares, 1)] if len(shares) > 1 else ["replay"]
        return dict(zip(names, shares, strict=True)) if self.replay_file else {}


def open_replay(config: Any, tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> dict[str, TokenStore]:
    """The token store of each source by its name. Documents are cut and cleaned as the domain's are.

    config: a mlm.config.Config. Raises UserError as `prepare` does.
    """
    replay, stores = config.replay, {}
    text = replace(config.corpus, dataset_name=None, dataset_config_name=None, train_file=None)
    text = replace(text, text_column=replay.replay_text_column or text.text_column)
    for number, name in enumerate(replay.shares):
        files = replay.replay_file if len(replay.shares) == 1 else replay.replay_file[number]
        own, whole_words = replace(text, validation_file=files), config.masking.whole_word_mask
        try:
            store = prepare(own, tokenizer, info, config.token_store, whole_words, only="validation")["validation"]
        except UserError as error:  # in the words of the flags that were given
            words = str(error).replace("--validation_file", "--replay_file")
            raise UserError(words.replace("--text_column", "--replay_text_column")) from None
        stores[name] = replace(store, header=store.header | {"split": name})
    return stores
