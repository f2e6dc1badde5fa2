"""What training measures: kept on the device, read for a line of the log, logged, and shown."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mlm.engine.update import MASKED, Step
from mlm.errors import one_line, printable
from mlm.figures import finite

RATES = ("mask_rate", "tokens_per_second")
BAR = "{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}"


class Progress:
    """Where a run stands: the steps taken and the sums over them. A checkpoint holds it."""

    def __init__(self) -> None:
        self.step = 0  # updates that were applied
        self.sums: dict[str, float] = {}  # the loss and the named scalars, over the masked tokens of all steps
        self.masked = 0  # ... and their number
        self.tokens = 0  # that went through the model, padding not counted
        self.seconds = 0.0  # spent in training steps
        self.blocked = 0.0  # seconds in which the loop waited for checkpoints
        self.overflows = 0  # steps that fp16's scaler made us take again
        self.evaluated = False  # whether the current weights have been evaluated
        self.restart()

    def restart(self) -> None:
        """Begins a window, the training between two lines of the log."""
        self._measured: list[torch.Tensor] = []
        self._masked, self._tokens, self._started = 0, 0, time.perf_counter()

    def add(self, applied: Step) -> None:
        """An optimizer step. Nothing waits for the device."""
        self._measured.append(torch.cat([applied.sums, applied.nonfinite[None]]))
        self._masked += applied.masked
        self._tokens += applied.tokens
        self.overflows += applied.overflows
        self.step += 1
        self.evaluated = False

    def read(self, scalars: tuple[str, ...]) -> tuple[dict[str, float], int]:
        """Ends the window and adds it to the sums. The host waits for the device here.

        Returns the figures of a line of the log, over all processes: the means a masked token of the loss and the
        named scalars, then RATES; and how many steps, the last ones, moved no weight, as a gradient was not finite."""
        *sums, nonfinite = torch.stack(self._measured).cpu().double().sum(dim=0).tolist()
        seconds = time.perf_counter() - self._started
        window = dict(zip(("loss", *scalars), sums, strict=False))  # a process without a share knows no names
        for name, value in window.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.masked += self._masked
        self.tokens += self._tokens
        self.seconds += seconds
        means = _means(window, self._masked)
        rates = (self._masked / self._tokens, self._tokens / seconds)
        return means | dict(zip(RATES, rates, strict=True)), int(nonfinite)

    def results(self) -> dict[str, Any]:
        """The figures of training, under the names that all_results.json gives them."""
        means = {f"train_{name}": value for name, value in _means(self.sums, self.masked).items()}
        return {
            **{"train_loss": 0.0, **means},
            "mask_rate": self.masked / max(self.tokens, 1),
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "train_seconds": self.seconds,
            "checkpoint_seconds": self.blocked,
            "steps": self.step,
            "skipped_steps": self.overflows,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _means(sums: dict[str, float], masked: int) -> dict[str, float]:
    """Means a masked token; of a source's loss over its own ones, and none where it has none."""
    counts = {name: sums.get(MASKED + name, masked) for name in sums if not name.startswith(MASKED)}
    return {name: sums[name] / max(count, 1) for name, count in counts.items() if count or MASKED + name not in sums}


class Log:
    """metrics.jsonl, trackers, a bar on a terminal, lines elsewhere. Only the main process writes.

    None of it ends a run: what cannot be written is said where that is possible, and left out."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator, self.is_main = folder, accelerator, accelerator.is_main_process
        self.started = time.perf_counter()
        self.bar: tqdm | None = None

    def print(self, text: str | None) -> None:
        """A line on standard output, above the bar where there is one."""
        if self.is_main and text:
            # A full disk, a terminal or a reader that is gone, a character that it lacks: training goes on.
            with suppress(OSError, ValueError), tqdm.external_write_mode():
                print(printable(text), flush=True)

    def event(self, event: str, step: int, **numbers: Any) -> None:
        """Appends a line to metrics.jsonl, and sends its numbers to the trackers."""
        if not self.is_main:
            return
        about = {"event": event, "step": step, "seconds": round(time.perf_counter() - self.started, 3)}
        line = json.dumps(about | finite(numbers)).encode() + b"\n"
        try:
            with (self.folder / "metrics.jsonl").open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):  # the next one must not go on from half of one on a full disk
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.print(f"metrics.jsonl lacks a line, {event} of step {step}: {error.strerror}")
        numbers = {f"{event}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
        with self._trackers():
            self.accelerator.log(numbers, step=step)

    def start_trackers(self, settings: dict[str, Any]) -> None:
        """Starts the accelerator's trackers with the settings of the run, each of a type that every tracker takes."""
        project = self.accelerator.project_configuration
        project.project_dir = project.logging_dir = str(self.folder)
        settings = {n: v if isinstance(v, int | float | str) else str(v) for n, v in settings.items()}
        with self._trackers():
            self.accelerator.init_trackers("mlm", config=settings)

    def finish_trackers(self) -> None:
        with self._trackers():
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers.clear()  # another run of this process has its own

    @contextmanager
    def _trackers(self) -> Iterator[None]:
        """A context in which the failure of a tracker costs what it would have shown."""
        try:
            yield
        except Exception as error:  # of files, of the network, of an account
            self.accelerator.trackers.clear()
            self.print(f"no more metrics for --report_to: {one_line(f'{type(error).__name__}: {error}')}")

    def advance(self, step: int, last_step: int) -> None:
        """Moves the bar, which is there on a terminal only."""
        if self.bar is None:
            disable = None if self.is_main else True  # None: it is disabled where there is no terminal
            self.bar = tqdm(total=last_step, initial=step - 1, dynamic_ncols=True, bar_format=BAR, disable=disable)
            self._first = (step, time.perf_counter())  # a run's first step takes longer than the others
        self.bar.update()

    def training(self, progress: Progress, window: dict[str, float], learning_rates: list[float]) -> None:
        """A line of training metrics, shown on the bar, and printed where standard output is no terminal."""
        step = progress.step
        rates = {f"learning_rate_{i}" if i > 1 else "learning_rate": r for i, r in enumerate(learning_rates, 1)}
        self.event("train", step, tokens=progress.tokens, **window, **rates)
        shown = [f"{name} {value:.3f}" for name, value in window.items() if name not in RATES]
        shown += [f"lr {rate:.1e}" for rate in learning_rates]
        text = ", ".join([*shown, f"{window['tokens_per_second']:,.0f} tokens/s"])
        self.bar.set_postfix_str(printable(text))  # a fork may name its scalars as it likes
        if self.bar.disable or not sys.stdout.isatty():
            first, since = self._first
            if step > first:
                seconds = (self.bar.total - step) * (time.perf_counter() - since) / (step - first)
                text += f", {timedelta(seconds=round(seconds))} left"
            self.print(f"{time.strftime('%H:%M:%S')} step {step}/{self.bar.total}: {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
