"""The end of a run on a terminal: a short table."""

from typing import Any

from mlm.evaluation.compare import CONFIDENCE
from mlm.figures import figure

ROWS = {
    "held-out perplexity": "perplexity",
    "held-out loss": "eval_loss",
    "out-of-domain perplexity": "general_perplexity",
    "out-of-domain loss": "general_eval_loss",
}


def outcome(results: dict[str, Any]) -> str:
    """A table of the figures before and after, with the gain, and of what the run took.

    results: as in all_results.json, and `output_dir`
    """
    has_before = "perplexity_before" in results
    lines = [f"{'':<26}{'before' if has_before else '':<11}{'after':<11}{'gain' if has_before else ''}".rstrip()]
    for title, name in ROWS.items():
        if name in results:
            before = figure(results[f"{name}_before"]) if f"{name}_before" in results else ""
            gain = _gain(results, name.removesuffix("perplexity")) if name.endswith("perplexity") else ""
            lines.append(f"{title:<26}{before:<11}{figure(results[name]):<11}{gain}".rstrip())
    minutes, seconds = divmod(round(results["train_seconds"]), 60)
    speed = f"{results['tokens_per_second']:,.0f} tokens/s"
    lines.append(f"{results['steps']:,} steps at {speed} in {minutes}:{seconds:02}")
    lines.append(f"saved to {results['output_dir']}")
    return "\n".join(lines)


def _gain(results: dict[str, Any], prefix: str) -> str:
    """Perplexity before / after, with its interval; nothing where there is no "before"."""
    if f"{prefix}gain" not in results:
        return ""
    gain, low, high = (results[f"{prefix}{name}"] for name in ("gain", "gain_low", "gain_high"))
    interval = "" if low is None else f" ({CONFIDENCE:.0%} interval {figure(low)} to {figure(high)})"
    return f"{figure(gain)}×{interval}"
