"""Tries settings of a run by successive halving, and prints the command of the best: which learning rate, how long.

    python scripts/sweep.py --config reviews.yaml --output_dir sweep \\
        --sweep learning_rate=5e-5,1e-4,2e-4,5e-4,1e-3 mlm_probability=0.15,0.3

All combinations of the values train, for a part of the steps that the other flags, train.py's, ask for. One in three
of them (FACTOR), those of the lowest held-out loss, go on to three times as many, and so on; the last two take all
(Jamieson & Talwalkar 2016, arXiv:1502.07943). Each run is a whole one of its length: its schedule ends there, and its
warm-up is in proportion. The beginning of a longer run, at a learning rate that has yet to fall, would say little.

All are measured on the same predictions, and compared by the difference of their losses, with an interval over
documents. That is one of two settings under one seed, and the best of many looks better than it is: repeat a close
choice with another --seed, and report the perplexity of other text than it was made on.

--output_dir gets a folder for each run, rung_N/SETTING, of which only the best keeps its weights, the table as
sweep.json, and report.html of its last runs. A sweep that was stopped goes on with the same command and
--resume_from_checkpoint latest. Nothing is pushed to the Hub.
"""

import io
import json
import logging
import math
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from startup import quick_imports

with quick_imports():
    import numpy as np
    import pyarrow.parquet as pq
    from accelerate import Accelerator

    from mlm import cli
    from mlm.config import Config
    from mlm.data.corpus import Files, several
    from mlm.engine.device import make_accelerator
    from mlm.engine.distributed import on_main
    from mlm.engine.signals import Stopped
    from mlm.errors import TrainingFailed, UserError, printable
    from mlm.evaluation.compare import nothing_learnt
    from mlm.evaluation.interval import CONFIDENCE, interval
    from mlm.figures import figure, finite
    from mlm.files import write_json
    from mlm.report.report import unlike, write_report
    from mlm.report.run_record import read_events, read_object, read_runs
    from mlm.train import train

FACTOR = 3  # as in scikit-learn's HalvingGridSearchCV
EPOCHS = "the sweep sets the steps, and its table says what more of them were worth"
FOLDER = "each run of a sweep has a folder of its own"
REFUSED = {
    "seed": "a lucky seed is no better setting; repeat the sweep with another --seed",
    **dict.fromkeys(("num_train_epochs", "max_train_steps"), EPOCHS),
    **dict.fromkeys(("output_dir", "overwrite_output_dir", "resume_from_checkpoint"), FOLDER),
}


@dataclass(frozen=True)
class SweepConfig:
    """Which settings are tried."""

    sweep: Files = None  # Try all combinations of the values of one or several flags: FLAG=VALUE,VALUE …


@dataclass(frozen=True)
class RunsConfig(Config):
    """A run, and what is tried in its place."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


class Trial(NamedTuple):
    """A run of a setting that has ended."""

    rung: int
    setting: str
    folder: Path
    results: dict[str, Any]  # as in all_results.json; empty where the loss was not finite any more

    @property
    def lost(self) -> bool:
        """Whether the setting has destroyed the model."""
        return not self.results or nothing_learnt(self.results) is not None

    @property
    def loss(self) -> float:
        return math.inf if self.lost else self.results["eval_loss"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    values = grid(several(cli.parse_config(RunsConfig, argv, __doc__).sweep.sweep))
    configs = {" ".join(setting): configure(argv, setting) for setting in product(*values.values())}
    base = check(configs)
    accelerator = make_accelerator(**asdict(base.device))
    configs = {setting: with_batch(config, accelerator.num_processes) for setting, config in configs.items()}
    output = Path(base.run.output_dir)
    on_main(lambda: check_folder(output, base), accelerator)
    rungs = plan(len(configs))
    accelerator.print(cost(rungs))
    with each_warning_once():
        trials = halve(output, configs, rungs, accelerator)
    summary = on_main(lambda: conclude(output, trials, values, configs), accelerator)
    accelerator.print(summary.pop("lines"))
    if not summary:
        raise UserError("no setting is left, each has destroyed the model: try lower values of learning_rate")
    return summary


def halve(
    output: Path, configs: dict[str, Config], rungs: Sequence[tuple[int, int]], accelerator: Accelerator
) -> list[Trial]:
    """The runs, in the order of their ends. Raises UserError where two do not compare, and what `run` raises."""
    trials: list[Trial] = []
    left = list(configs)
    for number, (count, divisor) in enumerate(rungs, 1):
        for setting in left[:count]:
            folder = output / f"rung_{number}" / quote(setting.replace(" ", ","), safe="=,+")
            config = shortened(configs[setting], divisor, folder)
            trials.append(Trial(number, setting, folder, run(setting, config, accelerator)))
            accelerator.print(in_words(trials[-1], len(rungs)))
            on_main(lambda: check_comparable(trials[0], trials[-1]), accelerator)
            if divisor > 1 and accelerator.is_main_process:
                drop_weights(folder)
        left = [trial.setting for trial in ranked(trials, number) if not trial.lost]
    return trials


@contextmanager
def each_warning_once() -> Iterator[None]:
    """A context in which a message that was logged before is left out: all runs have the same text."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in seen and not seen.add(text)

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def grid(words: Sequence[str]) -> dict[str, list[str]]:
    """{"learning_rate": ["learning_rate=1e-4", "learning_rate=2e-4"]} of "learning_rate=1e-4,2e-4". Raises UserError
    for words of another form, and flags that cannot be swept."""
    values: dict[str, list[str]] = {}
    for word in words:
        name, _, several_values = word.partition("=")
        if not several_values or name in values:
            raise UserError(f"--sweep {word}: give FLAG=VALUE,VALUE, each flag once")
        if name in REFUSED:
            raise UserError(f"--sweep {name}: {REFUSED[name]}")
        values[name] = [f"{name}={value}" for value in several_values.split(",")]
    return values


def configure(argv: Sequence[str], setting: Sequence[str]) -> Config:
    """The run that the command line asks for with a setting. Raises UserError as the command line does."""
    config = cli.parse_config(RunsConfig, [*argv, *(f"--{word}" for word in setting)])
    return Config(**{part.name: getattr(config, part.name) for part in fields(Config)})


def with_batch(config: Config, processes: int) -> Config:
    """The same run with its global batch as one flag, so that it is no other run on another number of processes."""
    batch = config.update.global_batch(processes)
    return replace(config, update=replace(config.update, train_batch_size=batch, gradient_accumulation_steps=1))


def check(configs: dict[str, Config]) -> Config:
    """The first of the runs. Raises UserError where they cannot be compared, or are not what a sweep can do."""
    runs = list(configs.values())
    base = runs[0]
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise UserError("--sweep: give two different settings or more, FLAG=VALUE,VALUE, each once")
    if any((run.evaluate, run.chunks) != (base.evaluate, base.chunks) for run in runs):
        raise UserError("--sweep: leave out flags of chunks and evaluation: all have to be measured on the same ones")
    fixed = {(run.train.seed, run.train.num_train_epochs, run.train.max_train_steps) for run in runs}
    folders = {
        (run.run.output_dir, run.run.overwrite_output_dir, run.checkpoint.resume_from_checkpoint) for run in runs
    }
    if len(fixed) > 1 or len(folders) > 1:  # of which `grid` does not know in files of flags
        raise UserError("--sweep config: the files have to agree on the seed, the length and the folder of a run")
    if not all(run.train.eval_on_start for run in runs):
        raise UserError(
            "--eval_on_start false: leave it out; what is compared is written with the figures before a run"
        )
    if base.run.output_dir is None:
        raise UserError("give --output_dir; a sweep that is stopped goes on there")
    if base.checkpoint.resume_from_checkpoint not in (None, "latest"):
        raise UserError("--resume_from_checkpoint: a sweep goes on with `latest` only")
    return base


def check_folder(output: Path, base: Config) -> None:
    """Raises UserError where a sweep cannot begin, or go on, in the folder."""
    if (output / "run.json").exists():
        raise UserError(f"--output_dir {output} holds a run; name another folder")
    if any(output.glob("rung_*")) and not (base.checkpoint.resume_from_checkpoint or base.run.overwrite_output_dir):
        advice = "--resume_from_checkpoint latest goes on with it, --overwrite_output_dir trains its runs anew"
        raise UserError(f"--output_dir {output} holds a sweep; {advice}")


def plan(settings: int, factor: int = FACTOR) -> list[tuple[int, int]]:
    """How many settings each rung has, and what the steps of a run are divided by in it."""
    counts = [settings]
    while counts[-1] > 2:
        counts.append(max(2, math.ceil(counts[-1] / factor)))
    return [(count, factor**below) for below, count in zip(reversed(range(len(counts))), counts, strict=True)]


def cost(rungs: Sequence[tuple[int, int]]) -> str:
    shares = ("all" if divisor == 1 else f"1/{divisor} of the" for _, divisor in rungs)
    parts = ", ".join(f"{count} take {share} steps" for (count, _), share in zip(rungs, shares, strict=True))
    steps, runs = sum(count / divisor for count, divisor in rungs), sum(count for count, _ in rungs)
    return f"{rungs[0][0]} settings: {parts}: {figure(steps)} times the steps of one run, {runs} times its evaluations"


def shortened(config: Config, divisor: int, folder: Path) -> Config:
    """A run of a part of the steps, with as large a part of the warm-up, in a folder of its own."""
    steps, epochs = config.train.max_train_steps, config.train.num_train_epochs / divisor
    warmup = config.optimizer.num_warmup_steps // divisor
    return replace(
        config,
        train=replace(config.train, max_train_steps=steps and math.ceil(steps / divisor), num_train_epochs=epochs),
        optimizer=replace(config.optimizer, num_warmup_steps=warmup),
        run=replace(config.run, output_dir=str(folder), push_to_hub=False),
    )


def run(setting: str, config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """The results of a run, which may have ended before; empty where its loss was not finite any more.

    Raises UserError where it fails for another reason, and Stopped."""
    if (found := on_main(lambda: ended(config), accelerator)) is not None:
        return found
    try:
        with redirect_stdout(io.StringIO()):  # its bar, on standard error, is seen
            return train(config).results
    except TrainingFailed as error:
        accelerator.print(f"{setting}: {error}")
        return on_main(lambda: read_object(Path(config.run.output_dir) / "all_results.json"), accelerator)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except Stopped as stop:
        name, again = signal.Signals(stop.number).name, "the same command with --resume_from_checkpoint latest goes on"
        raise Stopped(stop.number, f"stopped by {name} in the run of {setting}; {again}") from stop


def ended(config: Config) -> dict[str, Any] | None:
    """The results of this very run, if it goes on and has ended in its folder, as `run` gives them. It may have no
    weights any more, so that train() would not find it finished. Raises UserError where another has."""
    if config.checkpoint.resume_from_checkpoint is None or config.run.overwrite_output_dir:
        return None
    folder = Path(config.run.output_dir)
    asked = json.loads(json.dumps(asdict(config)))
    ran = read_object(folder / "run.json").get("configuration", {})
    events = read_events(folder / "metrics.jsonl")
    if not (events and events[-1]["event"] == "end"):
        return None
    parts = asked.keys() - {"checkpoint", "run", "token_store"}
    if changed := sorted(n for part in parts for n, v in asked[part].items() if ran.get(part, {}).get(n) != v):
        why = f"{folder} has ended with other values of {', '.join(changed)}"
        advice = "a sweep goes on with the same command and as many settings; or name another --output_dir"
        raise UserError(f"--resume_from_checkpoint latest: {why}; {advice}")
    return read_object(folder / "all_results.json")


def drop_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def check_comparable(first: Trial, trial: Trial) -> None:
    """Raises UserError where two runs were measured on other text, or by another tokenizer."""
    if trial is not first and (reason := unlike(read_runs([first.folder, trial.folder]), "held_out")):
        raise UserError(f"{first.setting} and {trial.setting} do not compare: {reason}")


def ranked(trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Those of a rung, the lowest held-out loss first."""
    return sorted((trial for trial in trials if trial.rung == rung), key=lambda trial: trial.loss)


def in_words(trial: Trial, rungs: int) -> str:
    parts = [f"rung {trial.rung} of {rungs}, {trial.setting}"]
    if trial.results:
        parts.append(f"perplexity {figure(trial.results['perplexity'])} after {trial.results['steps']:,} steps")
    return printable(", ".join([*parts, *(["lost"] if trial.lost else [])]))


def difference(trial: Trial, other: Trial) -> dict[str, Any]:
    """The loss of one run less that of another, in nats a masked token, and its interval over documents."""
    (count, nats), (_, its) = map(nats_of_documents, (trial, other))
    low, high = interval(nats - its, count)
    return {"value": float((nats - its).sum() / count.sum()), "interval": [low, high]}


def nats_of_documents(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """The masked tokens of each held-out document, [U] int64, and their nats after the run, [U] float64."""
    held_out = [("text", "==", "held_out")]
    documents = pq.read_table(trial.folder / "documents.parquet", filters=held_out)
    return documents["masked_tokens"].to_numpy(), documents["nats_after"].to_numpy()


def conclude(
    output: Path, trials: Sequence[Trial], values: dict[str, list[str]], configs: dict[str, Config]
) -> dict[str, Any]:
    """Writes sweep.json and report.html, and drops the weights of all but the best. Returns the figures for the last
    line of output, with "lines" to print: these alone where no setting is left."""
    rungs = [ranked(trials, number) for number in range(1, trials[-1].rung + 1)]
    best, *others = rungs[-1]
    rows = [row(trial, rung[0]) for rung in rungs for trial in rung]
    for folder in {*output.glob("rung_*/*")} - {best.folder}:  # also those of a sweep that was begun anew
        drop_weights(folder)
    if best.lost:
        write_json(output / "sweep.json", finite({"best": None, "runs": rows}))
        return {"lines": printable(table(rows))}
    own = [trial for trial in trials if trial.setting == best.setting]
    worth = [difference(after, before) for before, after in pairwise(own)]
    words = ["python", str(Path(__file__).with_name("train.py")), *flags(configs[best.setting], f"{output}/best")]
    found = {"setting": best.setting, "output_dir": str(best.folder), "command": shlex.join(words)}
    found |= {name: best.results.get(name) for name in ("perplexity", "perplexity_before", "eval_loss", "steps")}
    write_json(output / "sweep.json", finite({"best": found, "more_steps": worth, "runs": rows}))
    report = output / "report.html"
    shown = (*reversed(own), *(trial for trial in others if not trial.lost))  # the page has six colours
    write_report(read_runs([trial.folder for trial in shown]), report)
    lines = [table(rows), in_steps(own, worth), *at_an_end(values, best.setting)]
    lines += [f"the best is in {best.folder}, its runs of each length beside the next best in {report}"]
    lines += ["to train it anew:", found["command"]]
    return {**found, "report": str(report), "lines": printable("\n".join(lines))}


def row(trial: Trial, best: Trial) -> dict[str, Any]:
    """What sweep.json has of a run, with its difference to the best of its rung: "within_noise" if it may be none."""
    figures = {name: trial.results.get(name) for name in ("steps", "perplexity", "eval_loss")}
    about = {"rung": trial.rung, "setting": trial.setting, "output_dir": str(trial.folder), "lost": trial.lost}
    if trial is best or trial.lost:
        return {**about, **figures, "difference": None, "within_noise": None}
    above = difference(trial, best)
    low, _ = above["interval"]
    return {**about, **figures, "difference": above, "within_noise": None if math.isnan(low) else low <= 0}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The runs, each rung in the order of its losses."""
    width = max(len(row["setting"]) for row in rows)
    lines = [f"rung  {'setting':<{width}}  steps   perplexity  nats above the best ({CONFIDENCE:.0%} interval)"]
    for row in rows:
        steps = "" if row["steps"] is None else f"{row['steps']:,}"
        note = "lost" if row["lost"] else "best"
        if above := row["difference"]:
            note = signed(above) + (", within noise" if row["within_noise"] else "")
        perplexity = figure(row["perplexity"]) if steps else ""
        lines.append(f"{row['rung']:>4}  {row['setting']:<{width}}  {steps:>5}   {perplexity:>10}  {note}".rstrip())
    return "\n".join(lines)


def signed(difference: dict[str, Any]) -> str:
    """A difference of losses with its interval."""
    low, high = difference["interval"]
    sure = f"{low:+.4f} to {high:+.4f}" if math.isfinite(low) else "no interval"
    return f"{difference['value']:+.4f} ({sure})"


def in_steps(trials: Sequence[Trial], worth: Sequence[dict[str, Any]]) -> str:
    """What a setting came to in more and more steps, each with the difference to what fewer came to."""
    results = [trial.results for trial in trials]
    parts = [f"perplexity {figure(found['perplexity'])} after {found['steps']:,} steps" for found in results]
    more = (f"{part}, {signed(own)} nats" for part, own in zip(parts[1:], worth, strict=True))
    return f"best: {trials[0].setting}, {'; '.join([parts[0], *more])}"


def at_an_end(values: dict[str, list[str]], best: str) -> list[str]:
    """A line for each number whose best value is the smallest or the largest of three or more."""
    lines = []
    for words in values.values():
        with suppress(ValueError):
            numbers = {word: float(word.partition("=")[2]) for word in words}
            [chosen] = numbers.keys() & set(best.split())
            for end, advice in ((min, "smaller"), (max, "larger")):
                if len(numbers) > 2 and numbers[chosen] == end(numbers.values()):
                    lines.append(f"{chosen} is the {end.__name__}imum of those tried: try {advice} ones too")
    return lines


def flags(config: Config, output_dir: str) -> list[str]:
    """The command line of a run in `output_dir`: what differs from the defaults."""
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, resume_from_checkpoint=None),
        run=replace(config.run, output_dir=output_dir, overwrite_output_dir=False),
    )
    words = []
    for part in fields(config):
        own = getattr(config, part.name)
        for setting in fields(own):
            value = getattr(own, setting.name)
            if isinstance(value, tuple):
                words += [f"--{setting.name}", *map(str, value)]
            elif value != setting.default:
                words.append(f"--{setting.name}={str(value).lower() if isinstance(value, bool | None) else value}")
    return words


if __name__ == "__main__":
    cli.run(main)
