"""The built-in demo: a small BERT learns the prose of this Python installation and shows what it learnt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from startup import quick_imports

with quick_imports():
    from demo_corpus import with_demo_corpus
    from examples import with_examples
    from terminal import table

    from mlm import cli
    from mlm.config import Config
    from mlm.inference.fill_mask import fill
    from mlm.model.load import load_model
    from mlm.model.sparse_head import SparseMaskedLM
    from mlm.report.report import write_report
    from mlm.report.run_record import read_runs
    from mlm.train import train

DEMO = Path(__file__).with_name("demo.yaml")
SENTENCES = (
    "Return [MASK] if the object is a string.",
    "Raise a ValueError [MASK] the value is not found.",
    "Return the number [MASK] elements.",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
    config = with_demo_corpus(cli.parse_config(Config, ["--config", str(DEMO), *argv], __doc__))
    result = train(config)
    # The seed draws the very weights from which training began.
    fresh = load_model(config.model, result.tokenizer, config.train.seed)
    fillers = [fill(SparseMaskedLM(model), result.tokenizer, SENTENCES, top_k=3) for model in (fresh, result.model)]
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
