"""Writes what runs did as one HTML file: figures, curves, what was learnt and what was lost, examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from startup import quick_imports

with quick_imports():
    from examples import with_examples
    from sentences import read_sentences

    from mlm import cli
    from mlm.errors import printable
    from mlm.report.report import write_report
    from mlm.report.run_record import read_runs


@dataclass(frozen=True)
class ReportConfig:
    """Where the report goes, and what is filled for it."""

    output: str | None = None  # Write this file (default: report.html in the run; of several, beside the first).
    sentences_file: str | None = None  # Fill the masks of this text file's sentences, one a line.
    trust_remote_code: bool = False  # Run the Python code that a checkpoint brings along.


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = cli.command(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Name the --output_dir of a training run.")
    config, rest = cli.parse([ReportConfig], argv, parser)
    folders = [Path(run) for run in rest.runs]
    beside = folders[0] if len(folders) == 1 else folders[0].parent
    output = Path(config.output or beside / "report.html")
    sentences = list(read_sentences(config.sentences_file).values()) if config.sentences_file else None
    runs = []
    for run in read_runs(folders):  # all of them: a mistake is found before models are loaded
        filled, why_not = with_examples(run, sentences, config.trust_remote_code)
        print(why_not, end="")
        runs.append(filled)
    write_report(runs, output)
    several = f" of {len(runs)} runs" if len(runs) > 1 else ""
    print(printable(f"report{several}: {output}"))
    return {"report": str(output)}


if __name__ == "__main__":
    cli.run(main)
