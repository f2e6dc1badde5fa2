"""The model card: README.md of a run directory, as a page of the Hub shows it. Its words are in model_card.md."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mlm.data import corpus
from mlm.data.corpus import CorpusConfig
from mlm.errors import one_line, printable
from mlm.figures import figure

METRICS = {"perplexity": "Perplexity", "accuracy": "Accuracy", "bits_per_character": "Bits per character"}


def short(source: str | list[str] | tuple[str, ...], parts: int = 1) -> str:
    """A Hub name as it is; the last parts of local paths, whose beginnings mean nothing elsewhere."""
    if not isinstance(source, str):
        return ", ".join(short(each, parts) for each in source)
    local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).exists()
    return "/".join(Path(source).parts[-parts:]) if local else source


def _letters(name: str) -> str:
    """A name as Markdown shows it letter for letter, with no tag, link, table or line of its own."""
    return re.sub(r"([\\`*_\[\]<>#|~&!$])", r"\\\1", one_line(printable(name)))


def model_card(name: str, config: Any, results: dict[str, Any]) -> str:
    """The text of README.md, with the figures in its metadata as the Hub's model-index takes them.

    config: the run's config.Config, or a fork's; results: as in all_results.json"""
    name, base, text = printable(name), config.model.model_name_or_path, config.corpus
    out_of_domain = corpus.out_of_domain(config.out_of_domain, text)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        base_model=None if base is None or Path(base).exists() else base,
        datasets=None if text.dataset_name is None or Path(text.dataset_name).exists() else text.dataset_name,
        tags=["masked-language-modeling", "domain-adaptation"],
        model_name=name,
        eval_results=[*_eval_results(results, "", text), *_eval_results(results, "out_of_domain_", out_of_domain)],
    )
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_suffix(".md")),
        **{"config": config, "results": results, "metrics": METRICS, "quoted": json.dumps(name, ensure_ascii=False)},
        **{"figure": figure, "letters": _letters, "task_in_words": task_in_words, "model_name": name},
        domain=_letters(short(text.dataset_name or text.train_file)),
        model=_letters(short(base)) if base else f"a {config.model.model_type or 'small BERT'} from scratch",
        out_of_domain=out_of_domain and _letters(short(corpus.origin(out_of_domain, "validation"))),
        task=config.task.given and _letters(short(config.task.given)),
    )
    return card.content + "\n"


def _eval_results(results: dict[str, Any], prefix: str, text: CorpusConfig | None) -> list[EvalResult]:
    """The figures that are numbers, as the Hub takes no null. It tells data sets apart by type and config."""
    if text is None:
        return []
    name, kind = printable(short(corpus.origin(text, "validation"))), "out-of-domain text" if prefix else None
    about = {"task_type": "fill-mask", "task_name": "Masked language modelling", "dataset_split": "validation"}
    about |= {"dataset_type": name, "dataset_name": f"{name} ({kind})" if kind else name}
    about |= {"dataset_config": text.dataset_config_name or kind}
    values = {metric: results.get(f"{prefix}{metric}") for metric in METRICS}
    return [
        EvalResult(**about, metric_type=metric, metric_name=METRICS[metric], metric_value=value)
        for metric, value in values.items()
        if value is not None
    ]


def task_in_words(results: dict[str, Any]) -> str:
    """What classifiers of frozen features gained with the fewest and the most labels, or a search, in Markdown."""
    lines, queries = [], results.get("task_queries")
    for key in (key.removesuffix("_low") for key in results if re.fullmatch("task_.*(accuracy|_[0-9]+)_low", key)):
        shares = (results[f"{key}{name}"] for name in ("_before", "", "_difference", "_low", "_high"))
        before, after, difference, low, high = (figure(100 * share) for share in shares)
        nothing = f"no {'query' if queries else 'prediction'} differs"  # a width of 0 is no certainty
        sure = nothing if low == high == "0" else f"95% interval {low} to {high}"
        gain = f"{before}% before, {after}% after, difference {difference} points ({sure})"
        labels = results.get(key.replace("accuracy", "labels_a_class"))
        of = f"{queries:,} queries" if queries else f"at most {labels:,} labels a class"
        what = re.sub("task_(few_)?", "", key).replace("mrr", "MRR").replace("_", "@")
        lines.append(f"- task, {of}: {what} {gain}")
    if seen := results["task_in_training_text"]:
        rows = f"first in rows {', '.join(map(str, results['task_first_rows_in_training_text']))}, counted from 0"
        lines.append(f"- {seen:,} texts of the task ({rows}) stand in the training text; no label was trained on")
    return "\n".join(dict.fromkeys(lines))  # the fewest may be the most
