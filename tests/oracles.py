"""Slow and obvious versions of what the modules do fast. Nothing here uses the modules."""

from typing import Any

# The token store and its chunks


def tokens_of(tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """(ids, word_starts) of one document, from the ordinary call of a fast tokenizer.

    A word starts where `word_ids` changes; special tokens, which have no word there, are words of their own.
    """
    encoding = tokenizer(text)
    words = encoding.word_ids()
    starts = [word is None or i == 0 or word != words[i - 1] for i, word in enumerate(words)]
    return encoding["input_ids"], starts


def chunks_of(documents: list[list], chunk_size: int, remainder: str, padding: Any) -> list[list]:
    """Joins the documents into one list and slices it."""
    stream = [value for document in documents for value in document]
    rows = [stream[start : start + chunk_size] for start in range(0, len(stream), chunk_size)]
    if rows and len(rows[-1]) < chunk_size:
        last = rows.pop()
        if remainder == "pad":
            rows.append(last + [padding] * (chunk_size - len(last)))
    return rows


def course_chunks(batch: dict[str, list[list]], chunk_size: int) -> dict[str, list[list]]:
    """What the Hugging Face course maps over 1,000 documents at a time: all columns joined and cut.

    https://huggingface.co/learn/llm-course/chapter7/3, `group_texts`, less its copy of the ids as labels.
    """
    whole = sum(map(len, batch["input_ids"])) // chunk_size * chunk_size
    columns = {name: [value for document in column for value in document] for name, column in batch.items()}
    return {
        name: [column[start : start + chunk_size] for start in range(0, whole, chunk_size)]
        for name, column in columns.items()
    }
