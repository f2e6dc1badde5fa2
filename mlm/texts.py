"""The texts of a run, opened: the tokenizer, the corpus's token stores, and what models are measured on."""

from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from mlm import corpus
from mlm.errors import UserError
from mlm.evaluate import Text, make_text
from mlm.masking import make_recipe
from mlm.model import vocabulary_size
from mlm.processes import local_main_process_first
from mlm.stream import StreamConfig, TokenStore, limit_threads, prepare, store_folder
from mlm.tokenizer import TokenFacts, corpus_tokenizer, load_tokenizer, token_facts

if TYPE_CHECKING:
    from mlm.train import Config


def open_corpus(
    config: "Config", accelerator: Accelerator
) -> tuple[PreTrainedTokenizerBase, TokenFacts, dict[str, TokenStore]]:
    """The tokenizer (named, or trained on the corpus for a model from nothing), its facts, the stores."""
    model, stream = config.model, _for_this_process(config.stream, accelerator)
    limit_threads(stream)
    with local_main_process_first(accelerator):  # one process a machine tokenises, the others find its store
        if name := model.tokenizer_name or model.model_name_or_path:
            tokenizer = load_tokenizer(name, model.trust_remote_code)
        else:
            tokenizer = corpus_tokenizer(config.corpus, vocabulary_size(model), store_folder(stream))
        facts = token_facts(tokenizer)
        stores = prepare(config.corpus, tokenizer, facts, stream, config.masking.whole_word_mask)
        return tokenizer, facts, stores


def open_texts(
    config: "Config",
    tokenizer: PreTrainedTokenizerBase,
    facts: TokenFacts,
    held_out: TokenStore,
    length: int,
    accelerator: Accelerator,
) -> dict[str, Text]:
    """What models are measured on, in chunks of `length` tokens: "held_out" and, where asked for, "general".

    Raises UserError where the general text cannot be read, or has not even one chunk.
    """
    sources, stores = {"held_out": config.corpus}, {"held_out": held_out}
    if general := corpus.general(config.general, config.corpus):
        stream, whole_words = _for_this_process(config.stream, accelerator), config.masking.whole_word_mask
        try:
            with local_main_process_first(accelerator):
                found = prepare(general, tokenizer, facts, stream, whole_words, only="validation")
        except UserError as error:  # in the words of the flags that were given
            words = str(error).replace("--validation_file", "--general_file")
            raise UserError(words.replace("--dataset_", "--general_dataset_")) from None
        sources["general"], stores["general"] = general, found["validation"]
    recipe = make_recipe(config.masking, facts)
    return {
        name: make_text(
            corpus.origin(sources[name], "validation"),
            store,
            config.chunks,
            length,
            recipe,
            facts,
            config.evaluate,
        )
        for name, store in stores.items()
    }


def _for_this_process(stream: StreamConfig, accelerator: Accelerator) -> StreamConfig:
    return stream if accelerator.is_local_main_process else replace(stream, overwrite_cache=False)
