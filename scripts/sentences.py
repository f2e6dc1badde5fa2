"""Sentences that a user gives in a file."""

from mlm.errors import UserError, one_line


def read_sentences(path: str) -> dict[int, str]:
    """The non-blank lines of a UTF-8 text file (`-`: standard input): {line number from 1: sentence}.

    Raises UserError where the file cannot be read, or holds none.
    """
    name, source = ("standard input", 0) if path == "-" else (path, path)
    try:
        # utf-8-sig: editors on Windows write a byte order mark
        with open(source, encoding="utf-8-sig", closefd=path != "-") as file:
            sentences = {number: line.rstrip("\n") for number, line in enumerate(file, 1) if line.strip()}
    except OSError as error:
        raise UserError(f"{name}: cannot read the sentences ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({one_line(error)})") from None
    if not sentences:
        raise UserError(f"{name}: no sentence in it; write one on each line")
    return sentences
