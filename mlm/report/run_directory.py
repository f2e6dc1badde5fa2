"""What a run leaves behind: the run directory.

<output_dir>/config.json, model.safetensors, tokenizer.json, …   as save_pretrained writes them
             all_results.json    perplexity before and after, gain, losses, tokens/s
             comparison.json     before against after: intervals, breakdowns, words (compare.py)
             documents.parquet   the same for each document
             metrics.jsonl       one JSON object a line, each with an `event` and a `step`
             run.json            full configuration, versions, hardware, commit, fingerprints
             checkpoints/        see checkpoint.py
             README.md           a model card (model_card.py)
             fill_mask.json, report.html   once scripts/report.py has been here"""

import json
import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.engine import checkpoint
from mlm.engine.distributed import from_main
from mlm.engine.experiment import differences
from mlm.errors import UserError, at_least
from mlm.evaluation.compare import Conclusion
from mlm.files import no_locks, sync, write_json, write_text
from mlm.hub import no_bars
from mlm.report.run_record import holds_run, read_events, read_object, recorded_files

log = logging.getLogger(__name__)

ENDED = ("all_results.json", "comparison.json", "documents.parquet", "fill_mask.json", "report.html")
PARTIALS = tuple(f"{name}.partial" for name in (*ENDED, "run.json", "metrics.jsonl", "README.md"))  # of a killed run
TRACKER_FILES = ("events.out.tfevents.*", "hparams.yml")  # of TensorBoard's tracker, in <output_dir>/mlm
# The names that save_pretrained gives its files, in this version of transformers or an earlier one. One that is left
# beside a new model is read with it: special_tokens_map.json would give it another mask token.
MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors"),
    *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-[0-9]*-of-[0-9]*.bin"),
    *("pytorch_model.bin.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "bpe.codes"),
)
PATHS = {"name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file"}  # of the machine, in their JSON


@dataclass(frozen=True)
class RunConfig:
    """Where a run is saved, and where its metrics go."""

    output_dir: str | None = None  # Save the run in this folder (default: runs/DATE-TIME).
    overwrite_output_dir: bool = False  # Replace the earlier run in that folder, and nothing else there.
    logging_steps: int = 10  # Log training metrics every so many steps.
    with_tracking: bool = False  # Send the metrics to experiment trackers too.
    report_to: str = "all"  # Send them to this tracker: tensorboard, wandb or another; all means all.
    push_to_hub: bool = False  # Upload the run to the Hub when it has ended.
    hub_model_id: str | None = None  # Upload to this repository (default: the name of --output_dir).
    hub_private_repo: bool = True  # Upload to a private repository only.

    def __post_init__(self) -> None:
        at_least(self, 1, "logging_steps")

    @property
    def trackers(self) -> str | None:
        return self.report_to if self.with_tracking else None


class RunDirectory:
    """The directory of a run, claimed and filled. Every process looks at it; only the main process writes.

    resume: --resume_from_checkpoint. Raises UserError where the directory holds something else, or cannot be written.

    Nothing in it is ever removed but what a run has written there, and only where run.json says that one has."""

    def __init__(self, config: RunConfig, resume: str | None, accelerator: Accelerator) -> None:
        # The main process's clock names the folder for all.
        name = config.output_dir or from_main(time.strftime("runs/%Y%m%d-%H%M%S"), accelerator)
        self.folder, self.is_main = Path(name), accelerator.is_main_process
        self.checkpoints = self.folder / "checkpoints"
        # whether the run that is in the directory is resumed, or whatever is there is to be replaced
        self.overwrites = config.overwrite_output_dir
        source = str(self.folder) if resume == "latest" else resume
        self.resumes = bool(source) and Path(os.path.realpath(source)).is_relative_to(os.path.realpath(self.folder))
        self._lock = FileLock(self.folder / ".lock", timeout=0, preserve_lock_file=True)
        # None writes yet: a mistake that is found later must not have cost what is here.
        here = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        early = {".lock", "run.json.partial"}  # what a run leaves that is killed as it begins
        if here - early and not holds_run(self.folder):
            reason = "is not empty, and what it holds is no run of this program, which is never replaced"
            raise UserError(f"--output_dir {self.folder} {reason}; name another folder")
        if "run.json" in here and not (self.overwrites or self.resumes):
            advice = "give --overwrite_output_dir to replace it, or --resume_from_checkpoint latest to resume it"
            raise UserError(f"--output_dir {self.folder} is not empty: it holds a run; {advice}")
        self._nearest = nearest = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            reason = "no permission" if nearest.is_dir() else "a file"
            raise UserError(f"--output_dir {self.folder}: cannot write in {nearest} ({reason})")

    def room(self, step: int | None) -> int:
        """Bytes that can be written here, as far as the file system knows, once `begin` has removed what is old."""
        disk = shutil.disk_usage(self._nearest)
        free = disk.free if disk.total else sys.maxsize  # of those that keep no count, as /proc
        folders = [self.folder / "model.partial", *checkpoint.outdated(self.checkpoints, self._kept(step))]
        files = [path for folder in folders for path in folder.rglob("*")]
        status = [path.lstat() for path in files + (self.model_files() if self.overwrites else [])]
        return free + sum({s.st_ino: s.st_blocks * 512 for s in status}.values())  # hard links take their room once

    def _kept(self, step: int | None) -> int:
        """The last step whose checkpoint stays where a run begins after `step`, as in `begin`; -1: none stays."""
        return step if step is not None and self.resumes else -1

    def finished(self, experiment: dict[str, Any]) -> dict[str, Any] | None:
        """The results of a run of this very experiment that has finished here; None: there is none. Raises UserError
        where the run that has finished here was another experiment, and left no checkpoint."""
        if self.overwrites:
            return None
        try:
            results, about = (read_object(self.folder / name) for name in ("all_results.json", "run.json"))
        except UserError:
            return None
        if not results or not isinstance(ran := about.get("experiment"), dict):
            return None
        changed = differences(ran, json.loads(json.dumps(experiment)))
        if changed and not checkpoint.steps(self.checkpoints):
            found = f"{self.folder} holds a finished run of another experiment, with {', '.join(changed)}"
            raise UserError(f"--resume_from_checkpoint latest: {found}; --overwrite_output_dir replaces it")
        return None if changed else results

    def claim(self) -> None:
        """From here on the directory is this run's. Raises UserError where another run is at work in it."""
        try:
            if self.is_main and self.folder.is_dir() and not self._lock.is_locked:
                self._lock.acquire()
        except Timeout:
            raise UserError(f"--output_dir {self.folder}: another run is at work in it") from None
        except (OSError, NotImplementedError) as error:
            if not no_locks(error):
                raise
            log.warning("--output_dir %s: no locks there (%s): another run is not kept out", self.folder, error)

    def release(self) -> None:
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # still ours: no other run can hold it now
            self._lock.release()

    def begin(self, about: dict[str, Any], step: int | None) -> None:
        """Makes the directory and writes run.json: what has to be known to repeat the run. Raises UserError where
        another run is at work in it, or nothing can be written there.

        step: where a resumed run begins; what came later is dropped, to come again. None: at the beginning"""
        if not self.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.claim()
            for name in ENDED:  # they are not the figures of a run that begins or is resumed
                (self.folder / name).unlink(missing_ok=True)
            old = [*self.model_files(), self.folder / "README.md"] if self.overwrites else []
            self.about = about | {"files": recorded_files(self.folder)}
            write_json(self.folder / "run.json", self.about)  # before all else: with it the folder is a run's
            kept = self._kept(step)
            checkpoint.remove(*checkpoint.outdated(self.checkpoints, kept))
            write_text(self.folder / "metrics.jsonl", self._events_until(kept))
            old += [self.folder / name for name in PARTIALS]
            shutil.rmtree(self.folder / "model.partial", ignore_errors=True)
            if kept < 0:
                old += [path for pattern in TRACKER_FILES for path in (self.folder / "mlm").rglob(pattern)]
            for path in old:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: cannot write there ({error.strerror})") from None

    def _events_until(self, step: int) -> str:
        """The lines of metrics.jsonl that a run has written up to its checkpoint of this step."""
        kept = ""
        for event in read_events(self.folder / "metrics.jsonl"):
            if event["step"] <= step:
                kept += f"{json.dumps(event)}\n"
            if event["step"] >= step and event["event"] == "checkpoint":  # the state that is resumed
                break
        return kept

    def model_files(self) -> list[Path]:
        """The files of a saved model that are here: those that run.json names, and those of MODEL_FILES."""
        recorded = {name for name in recorded_files(self.folder) if (self.folder / name).is_file()}
        patterns = (path.name for pattern in MODEL_FILES for path in self.folder.glob(pattern) if path.is_file())
        return [self.folder / name for name in sorted(recorded.union(patterns))]

    def published(self, code: bool) -> list[Path]:
        """What an upload takes: the model as this run has saved it, the model card and the results.

        code: whether the model may bring Python files along. Raises UserError for a link, which may lead anywhere."""
        allowed = (*MODEL_FILES, "*.py") if code else MODEL_FILES
        recorded = sorted(recorded_files(self.folder))
        model = [name for name in recorded if any(fnmatchcase(name, pattern) for pattern in allowed)]
        files = [path for name in (*model, "README.md", "all_results.json") if (path := self.folder / name).is_file()]
        for path in files:
            if path.is_symlink():
                raise UserError(f"--push_to_hub: {path} is a link; put the file itself there")
        return files

    @no_bars()
    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """The adapted model, as an ordinary checkpoint. Raises OSError, or SafetensorError for a full disk. A disk
        that fills up, or a kill, leaves no half a model under its name; what stands there is on the disk when this
        returns. Where the checkpoint of this step holds the same bytes, the two become one file."""
        if not self.is_main:
            return
        partial = self.folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for name in ("config.json", "tokenizer_config.json"):  # of a base that was made elsewhere, perhaps
                settings = read_object(partial / name)
                write_json(partial / name, {key: value for key, value in settings.items() if key not in PATHS})
            checkpoint.share_weights(self.checkpoints / f"step_{step}", partial)
            saved, stale = sorted(partial.iterdir()), self.model_files()
            self.about["files"] = [path.name for path in saved]
            write_json(self.folder / "run.json", self.about)
            mode = (partial / "config.json").stat().st_mode  # safetensors gives its files to their owner alone
            for path in saved:
                path.chmod(mode)
                sync(path)
                path.replace(self.folder / path.name)
            for path in stale:
                if path.name not in self.about["files"]:
                    path.unlink(missing_ok=True)
            self._sync("run.json")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def save_results(self, results: dict[str, Any], conclusion: Conclusion, card: str) -> None:
        """The figures and the model card, of the main process. Raises OSError."""
        if conclusion.comparison is not None:
            write_json(self.folder / "comparison.json", conclusion.comparison)
        if conclusion.documents is not None:
            partial = self.folder / "documents.parquet.partial"
            pq.write_table(conclusion.documents, partial)
            partial.replace(self.folder / "documents.parquet")
        write_text(self.folder / "README.md", card)
        self._sync("comparison.json", "documents.parquet", "README.md")
        write_json(self.folder / "all_results.json", results)  # the last: with it the run is finished
        self._sync("all_results.json")

    def _sync(self, *names: str) -> None:
        """Has files that are here, and the folder's entries and its own, written to the disk."""
        existing = [path for path in map(self.folder.joinpath, names) if path.exists()]
        for path in (*existing, self.folder):
            sync(path)
        with suppress(PermissionError):  # a folder may be written in, and the one above it not be read
            sync(self.folder.absolute().parent)
