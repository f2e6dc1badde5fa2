"""What a run leaves behind: the run directory.

<output_dir>/config.json, model.safetensors, tokenizer.json, …   as save_pretrained writes them
             all_results.json    perplexity before and after, gain, losses, tokens/s
             comparison.json     before against after: intervals, breakdowns, words (compare.py)
             documents.parquet   the same for each document
             metrics.jsonl       one JSON object a line, each with an `event` and a `step`
             run.json            full configuration, versions, hardware, commit, fingerprints
             checkpoints/        see checkpoint.py
             README.md           a model card (card.py)
             fill_mask.json, report.html   once scripts/report.py has been here
"""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.data.batches import Batches
from mlm.engine import checkpoint
from mlm.errors import UserError, at_least, one_line
from mlm.evaluation.evaluate import EvalSet
from mlm.figures import exp_or_inf, figure, finite, flat
from mlm.files import write_json, write_text
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment
from mlm.report.metrics import Window
from mlm.report.model_card import model_card

ENDED = ("all_results.json", "comparison.json", "documents.parquet", "fill_mask.json", "report.html")
MODEL_FILES = {"config.json", "model.safetensors", "pytorch_model.bin"}


@dataclass(frozen=True)
class RunConfig:
    output_dir: str | None = None  # the run directory (default: runs/DATE-TIME)
    overwrite_output_dir: bool = False  # write into a directory that is not empty, replacing an earlier run
    logging_steps: int = 10  # steps between two lines of training metrics
    with_tracking: bool = False  # send the metrics to experiment trackers too
    report_to: str = "all"  # which trackers: all, tensorboard, wandb, …
    push_to_hub: bool = False  # upload the run directory to the Hub when it is done
    hub_model_id: str | None = None  # name of the repository to upload to (default: the name of output_dir)

    def __post_init__(self) -> None:
        at_least(self, 1, "logging_steps")


class Run:
    """The run directory while a run goes on. Only the main process writes and speaks."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, resumes: str | None) -> None:
        self.config = config
        self.is_main = accelerator.is_main_process
        self.folder = Path(config.output_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
        self.accelerator = accelerator
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self.hub_id: str | None = None
        # whether a run that is in the directory goes on, or whatever is there is to be replaced
        self.goes_on = resumes == "latest" or (
            resumes is not None and Path(resumes).resolve().is_relative_to(self.folder.resolve())
        )
        self._lock = FileLock(self.folder / ".lock", timeout=0)  # the kernel's: a killed run does not keep it
        # Every process looks, none writes yet: a mistake found later must not have cost what is here.
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir {self.folder}: this is a file")
        occupied = self.folder.is_dir() and any(self.folder.iterdir())
        if occupied and not (config.overwrite_output_dir or self.goes_on):
            raise UserError(
                f"--output_dir {self.folder} is not empty; give --overwrite_output_dir to replace "
                "what is there, or --resume_from_checkpoint latest to go on with it"
            )
        if self._holds_the_end_only() and resumes == "latest" and not config.overwrite_output_dir:
            raise UserError(
                f"--resume_from_checkpoint latest: {self.folder} holds a model and no checkpoint to go on "
                "from; give --overwrite_output_dir to replace it"
            )
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--output_dir {self.folder}: cannot write in {nearest}")

    def _holds_the_end_only(self) -> bool:
        """Whether a run that has ended, or a model of other origin, is here, and no checkpoint."""
        here = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        ended = "all_results.json" in here or ("run.json" not in here and here & MODEL_FILES)
        return bool(ended) and not checkpoint.steps(self.folder / "checkpoints")

    def say(self, text: str) -> None:
        """A line on standard output, above the bar where there is one."""
        if self.is_main and text:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def how_to_go_on(self, number: int, step: int) -> str:
        """Words for a run that a signal has stopped."""
        return (
            f"stopped by {signal.Signals(number).name} after step {step}; to go on, give the same command "
            f"with --output_dir {self.folder} --resume_from_checkpoint latest"
        )

    def begin(self, configuration: Any, experiment: dict[str, Any], step: int | None) -> None:
        """Makes the directory and writes run.json: what has to be known to repeat the run.

        step: where a resumed run goes on; what came later is dropped, to come again. None: at the beginning.

        Raises UserError where another run is at work in it, or nothing can be written there.
        """
        described = dataclasses.asdict(configuration)
        if self.is_main:
            if self.config.push_to_hub:
                self.hub_id = _create_repository(self.config.hub_model_id or self.folder.name)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._acquire()
                self._clear() if step is None or not self.goes_on else self._rewind(step)
                about = {"command": sys.argv, "configuration": described, "experiment": experiment}
                write_json(self.folder / "run.json", {**about, "environment": environment(self.accelerator)})
            except OSError as error:
                raise UserError(
                    f"--output_dir {self.folder}: cannot write there ({error.strerror})"
                ) from None
        if self.config.with_tracking:
            project = self.accelerator.project_configuration
            project.project_dir = project.logging_dir = str(self.folder)
            self.accelerator.init_trackers("mlm", config=dict(flat(described)))

    def __enter__(self) -> "Run":
        """From here on the directory, if it is there, is this run's: what it finds in it stays as it is.

        Raises UserError where another run is at work in it.
        """
        if self.is_main and self.folder.is_dir():
            self._acquire()
        return self

    def _acquire(self) -> None:
        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout:
            raise UserError(f"--output_dir {self.folder}: another run is at work in it") from None
        except NotImplementedError:
            pass  # a file system without locks

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # still ours: no other run can hold it now
            self._lock.release()

    def _clear(self) -> None:
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        self._unfinish()
        checkpoint.clear(self.folder / "checkpoints")

    def _unfinish(self) -> None:
        """Takes away what an ended run leaves: they are not the figures of one that begins or goes on."""
        for name in ENDED:
            (self.folder / name).unlink(missing_ok=True)

    def _rewind(self, step: int) -> None:
        self._unfinish()
        checkpoint.clear(self.folder / "checkpoints", after=step)
        metrics = self.folder / "metrics.jsonl"
        kept = []
        for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else ():
            try:
                event = json.loads(line)
                name, at = event["event"], int(event["step"])
            except (ValueError, TypeError, KeyError):  # what a killed run was writing, or no line of ours
                continue
            if at <= step:
                kept.append(line)
            if at >= step and name == "checkpoint":  # the state that is gone on from
                break
        write_text(metrics, "".join(f"{line}\n" for line in kept))

    def log(self, event: str, step: int, **values: Any) -> None:
        """Appends a line to metrics.jsonl, and sends its numbers to the trackers."""
        if not self.is_main:
            return
        line = {
            "event": event,
            "step": step,
            "seconds": round(time.perf_counter() - self.started, 3),
            **finite(values),
        }
        try:
            _append(self.folder / "metrics.jsonl", json.dumps(line) + "\n")
        except OSError as error:
            self.say(f"metrics.jsonl lacks a line, {event} of step {step}: {error.strerror}")
        if self.config.with_tracking:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=step)

    def advance(self, step: int, last_step: int) -> None:
        """Moves the bar, which is there on a terminal only."""
        if self.bar is None:
            self.bar = tqdm(
                total=last_step,
                initial=step - 1,
                unit=" steps",
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}",
                disable=None if self.is_main else True,
            )
        self.bar.update()

    def report(self, step: int, window: Window, learning_rate: float, tokens: int) -> None:
        """A line of training metrics, shown on the bar, and printed where standard output is no terminal.

        tokens: seen in training so far, padding not counted
        """
        loss, speed = window.loss, window.tokens / window.seconds
        self.log(
            "train", step, tokens=tokens, loss=loss, learning_rate=learning_rate, tokens_per_second=speed
        )
        seen = f"loss {loss:.3f}, perplexity {exp_or_inf(loss):.4g}, lr {learning_rate:.1e}, "
        seen += f"{speed:,.0f} tokens/s"
        self.bar.set_postfix_str(seen)
        if self.bar.disable or not sys.stdout.isatty():
            self.say(f"step {step}/{self.bar.total}: {seen}")

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        results: dict[str, Any],
        comparison: dict[str, Any] | None,
        documents: pa.Table | None,
    ) -> None:
        """The adapted model as an ordinary checkpoint, its results and its card; then, if asked, the Hub.

        comparison, documents: as compare.py has them; None where nothing was measured before.
        The last thing that a run does: afterwards the processes are no group any more.
        """
        if self.bar is not None:
            self.bar.close()
        if self.is_main:
            try:
                self._save_model(model, tokenizer)
                write_json(self.folder / "all_results.json", results)
                if comparison is not None:
                    write_json(self.folder / "comparison.json", comparison)
                    pq.write_table(documents, self.folder / "documents.partial")
                    (self.folder / "documents.partial").replace(self.folder / "documents.parquet")
                card = model_card(self.hub_id or self.folder.name, config, results)
                write_text(self.folder / "README.md", card)
            except (OSError, SafetensorError) as error:
                reason = one_line(getattr(error, "strerror", None) or error)
                raise UserError(
                    f"--output_dir {self.folder}: the model could not be saved ({reason}); "
                    "make room, then --resume_from_checkpoint latest goes on from the last checkpoint"
                ) from error
            reached, unigram = results["perplexity"], results["perplexity_unigram"]
            self.say(
                f"held-out perplexity {figure(reached)}, where token frequencies alone reach "
                f"{figure(unigram)}; saved to {self.folder}"
            )
        self.log("end", results["steps"], **results)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.is_main and self.config.push_to_hub:
            self._upload()

    def _save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Beside its place first: a disk that fills up, or a kill, leaves no half a model under its name."""
        partial = self.folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for path in partial.iterdir():
                path.replace(self.folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _upload(self) -> None:
        try:
            HfApi().upload_folder(
                repo_id=self.hub_id, folder_path=self.folder, ignore_patterns=["checkpoints/**", ".lock"]
            )
        except Exception as error:  # the model is safe on disk, whatever the Hub or the network says
            raise UserError(
                f"--push_to_hub: {self.folder} is whole, its upload failed: {one_line(error)}"
            ) from None
        self.say(f"uploaded to {self.hub_id}")


def plan(
    config: Any,
    model: SparseMaskedLM,
    batches: Batches,
    micro_batch: int,
    eval_sets: dict[str, EvalSet],
    steps: int,
    accelerator: Accelerator,
) -> str:
    """What is about to happen, for a person to read before it does."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = config.model.model_name_or_path or f"{model.model.config.model_type} from scratch"
    G, world = batches.global_batch, batches.world
    share = -(-G // world)
    passes = -(-share // micro_batch)
    often = ", more than there are: each step sees some several times" if batches.num_chunks < G else ""
    lines = {
        "model": f"{name} ({type(model.model).__name__}), {every:,} parameters, {trained:,} of them trained",
        "head": "on the masked positions" if model.sparse else "on all positions",
        "chunks": f"{batches.num_chunks:,} to train on, "
        + "".join(f"{len(text.chunk_ids):,} {name.replace('_', ' ')}, " for name, text in eval_sets.items())
        + f"of {batches.chunks.chunk_size} tokens",
        "batch": f"{G} chunks a step{often}: {world} process(es) of {share}, in {passes} pass(es) of at most "
        f"{min(micro_batch, share)}",
        "steps": f"{steps:,} ({steps * G / batches.num_chunks:.3g} epochs), {config.optimizer.lr_scheduler_type} "
        f"learning rate, peak {config.optimizer.learning_rate:g}",
        "precision": f"{accelerator.mixed_precision} on {accelerator.device}",
    }
    return "\n".join(f"{what:<10} {text}" for what, text in lines.items())


def _append(path: Path, line: str) -> None:
    """Adds a line, whole or not at all: the next one must not go on from half of one on a full disk."""
    with path.open("ab", buffering=0) as file:
        end, data = file.tell(), line.encode()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _create_repository(name: str) -> str:
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the login, of the name
        raise UserError(
            f"--push_to_hub: cannot create {name} there; log in with `hf auth login` ({one_line(error, 200)})"
        ) from None
