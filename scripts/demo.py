"""The built-in demo: a small BERT learns the prose of this Python installation and shows what it learnt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm.startup import quick_imports

with quick_imports():
    from mlm import cli
    from mlm.examples import with_examples
    from mlm.fill_mask import fill, table
    from mlm.model import SparseMaskedLM, load_model
    from mlm.report import read_runs, write_report
    from mlm.train import ROOMS, Config, train

DEMO = Path(__file__).with_name("demo.yaml")
SENTENCES = (
    "Return [MASK] if the object is a string.",
    "Raise a ValueError [MASK] the value is not found.",
    "Return the number [MASK] elements.",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
    *rooms, _ = cli.parse(ROOMS, ["--config", str(DEMO), *argv], cli.command(__doc__))
    config = Config(*rooms)
    result = train(config)
    # The seed draws the very weights from which training began.
    fresh = load_model(config.model, result.tokenizer, config.loop.seed)
    fillers = [
        fill(SparseMaskedLM(model), result.tokenizer, SENTENCES, top_k=3) for model in (fresh, result.model)
    ]
    for sentence, *columns in zip(SENTENCES, *fillers, strict=True):
        print(table(sentence, ["before", "after"], columns))
    before, after, unigram = (result.results[f"perplexity{when}"] for when in ("_before", "", "_unigram"))
    print(f"perplexity {before:.4g} before, {after:.4g} after, {unigram:.4g} for a model that has learnt")
    print(f"nothing but how frequent each token is: {after / unigram:.2f} of it")
    page = result.output_dir / "report.html"
    [run] = read_runs([result.output_dir])
    run, why_not = with_examples(run, sentences=None)
    print(why_not, end="")
    write_report([run], page)
    print(f"report: {page}")
    return {"output_dir": str(result.output_dir), "report": str(page), **result.results}


if __name__ == "__main__":
    cli.run(main)
