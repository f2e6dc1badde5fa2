"""Adapts a masked language model to a domain. Without arguments: the built-in demo."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlm import cli
from mlm.train import Config, train

DEMO = Path(__file__).with_name("demo.yaml")


def main(argv: Sequence[str]) -> dict[str, Any]:
    rooms = [field.default_factory for field in fields(Config)]
    config = Config(*cli.parse(rooms, argv, cli.command(__doc__))[:-1])
    model, corpus = config.model, config.corpus
    if not (model.model_name_or_path or model.config_name or model.model_type or corpus.dataset_name or corpus.train_file):
        config = Config(*cli.parse(rooms, ["--config", str(DEMO), *argv], cli.command(__doc__))[:-1])
    result = train(config)
    return {"output_dir": str(result.output_dir), **result.results}


if __name__ == "__main__":
    cli.run(main)
