"""Adapts a masked language model to a domain. Without arguments: the built-in demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm.startup import quick_imports

with quick_imports():
    from mlm import cli
    from mlm.train import ROOMS, Config, train

DEMO = Path(__file__).with_name("demo.yaml")


def main(argv: Sequence[str]) -> dict[str, Any]:
    *rooms, _ = cli.parse(ROOMS, argv, cli.command(__doc__))
    config = Config(*rooms)
    model, corpus = config.model, config.corpus
    named = (
        model.model_name_or_path,
        model.config_name,
        model.model_type,
        corpus.dataset_name,
        corpus.train_file,
    )
    if not any(named):
        *rooms, _ = cli.parse(ROOMS, ["--config", str(DEMO), *argv], cli.command(__doc__))
        config = Config(*rooms)
    result = train(config)
    return {"output_dir": str(result.output_dir), **result.results}


if __name__ == "__main__":
    cli.run(main)
