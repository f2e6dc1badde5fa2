"""Claims about the table that ends a run on a terminal."""

import math

from mlm.figures import figure
from mlm.report.summary import outcome

ENDED = {
    "output_dir": "runs/x",
    "perplexity": 40.0,
    "eval_loss": 3.689,
    "steps": 1200,
    "tokens_per_second": 9999.6,
    "train_seconds": 125.4,
}
BEFORE = {"perplexity_before": 80.0, "eval_loss_before": 4.382, "gain": 2.0, "gain_low": 1.9, "gain_high": 2.1}


def rows(results):
    return [" ".join(line.split()) for line in outcome(results).splitlines()]


def test_it_has_the_figures_before_and_after_and_the_gain_with_its_interval():
    general = {f"out_of_domain_{name}": value for name, value in (ENDED | BEFORE).items() if name[0] in "gpe"}
    assert rows({**ENDED, **BEFORE, **general, "out_of_domain_gain_low": None}) == [
        "before after gain",
        "held-out perplexity 80 40 2× (95% interval 1.9 to 2.1)",
        "held-out loss 4.382 3.689",
        "out-of-domain perplexity 80 40 2×",
        "out-of-domain loss 4.382 3.689",
        "1,200 steps at 10,000 tokens/s in 2:05",
        "saved to runs/x",
    ]


def test_an_interval_over_chunks_is_said_to_be_of_one_document():
    shown = rows({**ENDED, **BEFORE, "gain_documents": 1})
    assert shown[1] == "held-out perplexity 80 40 2× (95% interval 1.9 to 2.1 over chunks of one document)"


def test_a_run_that_measured_nothing_before_shows_what_there_is():
    assert rows(ENDED)[:3] == ["after", "held-out perplexity 40", "held-out loss 3.689"]


def test_the_name_of_the_folder_is_shown_and_not_sent():
    assert rows({**ENDED, "output_dir": "runs/\x1b[2Jx"})[-1] == "saved to runs/\\x1b[2Jx"


def test_a_run_that_has_diverged_says_undefined():
    assert rows({**ENDED, "perplexity": None, "eval_loss": None})[1] == "held-out perplexity undefined"
    assert [figure(value) for value in (math.inf, math.nan, None)] == ["undefined"] * 3, "as JSON has no infinity"
