"""Adapts a masked language model to a domain. Without arguments: the built-in demo."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from startup import quick_imports

with quick_imports():
    from demo_corpus import with_demo_corpus

    from mlm import cli
    from mlm.config import Config
    from mlm.errors import printable
    from mlm.report.summary import outcome
    from mlm.train import train

DEMO = Path(__file__).with_name("demo.yaml")


def main(argv: Sequence[str]) -> dict[str, Any]:
    config = cli.parse_config(Config, argv, __doc__)
    model, corpus = config.model, config.corpus
    named = (model.model_name_or_path, model.config_name, model.model_type, corpus.dataset_name, corpus.train_file)
    if not any(named):
        config = with_demo_corpus(cli.parse_config(Config, ["--config", str(DEMO), *argv], __doc__))
    result = train(config)
    return {"output_dir": str(result.output_dir), **result.results}


def words(result: dict[str, Any]) -> str:
    """For a person on a terminal: the figures, and what to look at next."""
    scripts, run = Path(__file__).parent, shlex.quote(result["output_dir"])
    return printable(
        f"\n{outcome(result)}\n\nnext: python {scripts}/report.py {run}\n"
        f"      python {scripts}/fill_mask.py --model_name_or_path {run} 'a sentence with a [MASK] .'"
    )


if __name__ == "__main__":
    cli.run(main, words)
