"""A run while it goes on: its directory, its log, its checkpoints, and the signals that ask it to stop."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.data import corpus
from mlm.data.task import read_task
from mlm.data.token_store import TokenStore
from mlm.engine import checkpoint
from mlm.engine.checkpoint import Stateful, Writer, not_written
from mlm.engine.distributed import agree, broadcast, check_same, from_main, host_group, lost_a_process, on_main
from mlm.engine.nonfinite import find_nonfinite
from mlm.engine.signals import Stopped, StopSignals
from mlm.engine.update import Update
from mlm.errors import TrainingFailed, UserError, one_line
from mlm.evaluation.compare import nothing_learnt
from mlm.evaluation.eval_set import EvalSet
from mlm.evaluation.evaluate import Evaluations, evaluate_all
from mlm.figures import figure, flat
from mlm.model.load import ModelConfig, load_model
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import check_encoder
from mlm.report.environment import environment, versions
from mlm.report.metrics import Log, Progress
from mlm.report.run_directory import RunDirectory
from mlm.report.run_record import read_object
from mlm.report.upload import announcement, create_repository, upload

PROBES = "scripts/evaluate.py --model_name_or_path RUN --compare BASE --task_file FILE does it"


class Run:
    """All of a run that is no arithmetic, on each process; only the main one writes and prints.

    config: a mlm.config.Config, or a fork's subclass. Raises UserError where --output_dir cannot be this run's."""

    def __init__(self, config: Any, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        settings = {name.rpartition(".")[2]: value for name, value in flat(asdict(replace(config, token_store=None)))}
        check_same({**settings, **versions(), "device": accelerator.device.type}, accelerator)
        self.directory = RunDirectory(config.run, config.checkpoint.resume_from_checkpoint, accelerator)
        self.folder, self.is_main = self.directory.folder, accelerator.is_main_process
        for text in (config.corpus, corpus.out_of_domain(config.out_of_domain, config.corpus)):
            if text:
                corpus.keep_apart(text, "--output_dir", self.folder)
        self.log = Log(self.folder, accelerator)
        self.stops = config.checkpoint.on_save_error == "stop"
        self.writer = Writer(self.directory.checkpoints, config.checkpoint.save_total_limit, self.stops)
        self.stop = StopSignals()
        self.group = host_group(accelerator)
        self.hub_id: str | None = None
        self.task = on_main(lambda: read_task(config.task, config.corpus), accelerator)

    def keeps(
        self,
        model: PreTrainedModel,
        update: Update,
        progress: Progress,
        before: Evaluations,
        extra_state: dict[str, Stateful],
        experiment: dict[str, Any],
    ) -> None:
        """What checkpoints hold: the weights, the loop's own state, and what a fork adds.

        Raises ValueError for a name in `extra_state` that the loop's own state has, or a value without state_dict."""
        own = {"update": update, "progress": progress, "before": before}
        for name, state in extra_state.items():
            if name in own or not (hasattr(state, "state_dict") and hasattr(state, "load_state_dict")):
                raise ValueError(f"extra_state {name!r}: another name, and state_dict and load_state_dict, are needed")
            checkpoint.pack(state.state_dict(), name, {})  # names what no checkpoint can hold
        if self.task:
            check_encoder(model)
        self.model, self.update, self.progress, self.states = model, update, progress, {**own, **extra_state}
        self.experiment = {**experiment, "state": sorted(self.states)}
        check_same(self.experiment, self.accelerator)
        broadcast(checkpoint.tensors(model).values(), self.accelerator)  # other processors draw other last bits

    def finished(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        """The results of this experiment, and its weights, where --resume_from_checkpoint latest finds it finished."""
        if self.config.checkpoint.resume_from_checkpoint != "latest":
            return None
        results = on_main(lambda: self.directory.finished(self.experiment), self.accelerator)
        if results:
            if self.is_main:
                saved = ModelConfig(str(self.folder), trust_remote_code=self.config.model.trust_remote_code)
                self.model.load_state_dict(load_model(saved, tokenizer, seed=0).state_dict())
            broadcast(checkpoint.tensors(self.model).values(), self.accelerator)
            self._publish(results)  # an upload that has failed is made up for
            done = f"{results['steps']} steps, held-out perplexity {figure(results['perplexity'])}"
            self.log.print(f"{self.folder} is finished: {done}; give --overwrite_output_dir to train anew")
            if self.task and "task_documents" not in results:
                self.log.print(f"the task is not probed; {PROBES}")
        return results

    def _create_repository(self) -> None:
        """Makes sure, on the main process, that there is a repository on the Hub where one is asked for."""
        config = self.config.run
        if self.is_main and config.push_to_hub and self.hub_id is None:
            name = config.hub_model_id or self.folder.resolve().name
            self.hub_id, self.hub_private = create_repository(name, config.hub_private_repo)

    def _publish(self, results: dict[str, Any]) -> None:
        """Uploads a successful run that has ended, if asked. Raises TrainingFailed where nothing was learnt."""
        base, measured = self.config.model.model_name_or_path, "perplexity_before" in results
        near = 0.9 * (results.get("perplexity_unigram") or math.inf)  # about that of constant logits
        if reason := nothing_learnt(results):
            message = f"nothing was learnt: {reason}; what is in {self.folder} is no success"
            if measured or base or results.get("mask_rate") == 0:
                raise TrainingFailed(message)
            self.log.print(f"warning: {message}")  # a model from scratch may also have had too few steps
        elif base and results["steps"] and not measured and results["perplexity"] > near:
            told = f"scripts/evaluate.py --model_name_or_path {self.folder} --compare {base} tells whether it ever did"
            self.log.print(f"warning: the model does hardly better than token frequencies alone; {told}")
        self._create_repository()
        if self.hub_id is not None:
            files = self.directory.published(self.config.model.trust_remote_code)
            self.log.print(announcement(files, self.hub_id, self.hub_private))
            upload(files, self.hub_id)
            self.log.print(f"uploaded to {self.hub_id}")

    def __enter__(self) -> "Run":
        """From here on signals ask for a checkpoint, and the directory, if it is there, stays as it is."""
        self.directory.claim()
        self.stop.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.log.close()
        self.writer.close()
        self.stop.__exit__(*error)
        self.directory.release()

    def resume(self, data: dict[str, Any]) -> None:
        """Puts everything back as --resume_from_checkpoint names it, if it does, and begins the directory.

        data: what run.json says of the corpus. Raises UserError for a checkpoint of another experiment, or none."""
        wanted = self.config.checkpoint.resume_from_checkpoint
        found, notes = checkpoint.find(wanted, self.directory.checkpoints, self.accelerator)
        self.log.print("\n".join(notes))
        if found:
            checkpoint.load(found, self.model, self.states, self.experiment, self.accelerator)
            self.log.print(f"resumed from {found}, after step {self.progress.step}")
        elif wanted is not None:
            self.log.print(f"--resume_from_checkpoint {wanted}: no checkpoint yet; training from the start")
        self._check_room(self.progress.step if found else None)
        self._create_repository()
        about = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "data": data}
        about |= {"configuration": asdict(self.config), "experiment": self.experiment}
        about["environment"] = environment(self.accelerator)
        words = Path(self.config.model.model_name_or_path or "") / "vocabulary_extension.json"  # extend_vocabulary.py
        about["vocabulary_extension"] = on_main(lambda: read_object(words), self.accelerator)
        self.directory.begin(about, self.progress.step if found else None)
        if self.config.run.with_tracking:
            self.log.start_trackers(dict(flat(about["configuration"])))
        if found and self.is_main and self.config.train.load_best_model_at_end:
            self.writer.remember_best(found.parent)
        sizes = {name: self.experiment[name] for name in ("steps", "train_batch_size", "chunks")}
        self.log.event("start", self.progress.step, **sizes)

    def _check_room(self, step: int | None) -> None:
        """Raises UserError, or says under --on_save_error continue, that a checkpoint and the model do not fit, or the
        model alone where a run is resumed after its last step. step: after which one is resumed; None: none is"""
        needed, what = sum(tensor.nbytes for tensor in checkpoint.tensors(self.model).values()), "the model takes"
        if step != self.experiment["steps"]:
            state: dict[str, torch.Tensor] = {}
            for name, stateful in self.states.items():
                checkpoint.pack(stateful.state_dict(), name, state)
            moments = 2 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)  # of AdamW
            needed += needed + (moments if step is None else 0) + sum(t.nbytes for t in state.values())
            what = "a checkpoint and the model take"
        room = on_main(lambda: self.directory.room(step), self.accelerator)
        if needed > room:
            takes = f"{what} {needed / 1e6:,.1f} MB, and {room / 1e6:,.1f} MB are free there"
            message = f"--output_dir {self.folder}: {takes}; make room, or name another folder"
            if self.stops:
                raise UserError(f"{message} (--on_save_error continue tries it all the same)")
            self.log.print(message)

    def missed_evaluation(self, last_step: int) -> bool:
        """Whether a resumed run was stopped between a step and the evaluation that comes after it."""
        step = self.progress.step
        return step > 0 and not self.progress.evaluated and self._evaluates(step, last_step)

    def _evaluates(self, step: int, last_step: int) -> bool:
        """Whether an evaluation in the loop comes after `step` steps: after the last one if it may be the best."""
        if step == last_step:
            return self.config.train.load_best_model_at_end
        return self.update.batches.due(self.config.train.eval_steps, step)

    def due(self, step: int, last_step: int) -> tuple[bool, bool, bool]:
        """Whether an evaluation, a checkpoint and a line of the log come after `step` steps."""
        self.log.advance(step, last_step)
        due = self.update.batches.due
        saves, logs = due(self.config.checkpoint.checkpointing_steps, step), due(self.config.run.logging_steps, step)
        return self._evaluates(step, last_step), saves, logs or step == last_step

    def requests(self) -> list[int]:
        """What all processes have to know of this one: a signal to stop, a checkpoint that failed."""
        return [self.stop.asked(), self.writer.failure is not None]

    def obey(self, requests: list[int]) -> None:
        """Does what any process has asked for. Raises Stopped, or UserError for a checkpoint that is lost."""
        asked, failed = requests
        if failed:
            failure = self.writer.take_failure()
            if self.stops:
                raise not_written(failure, self.directory.checkpoints)
            self.log.print(failure)
        if asked:
            self.save_and_stop()

    def report(self, stores: dict[str, TokenStore], tokenizer: PreTrainedTokenizerBase) -> None:
        """A line of the log. The host waits for the device here. Raises TrainingFailed where a loss or gradient since
        the last line was not finite, and names its documents."""
        update, progress = self.update, self.progress
        window, nonfinite = progress.read(update.scalars or ())
        if nonfinite:
            step = progress.step - nonfinite
            found = find_nonfinite(update, step, stores)
            self.log.event("end", step, **found._asdict())
            raise TrainingFailed(found.message(step, stores[found.split], tokenizer))
        self.log.training(progress, window, [scheduler.get_last_lr()[0] for scheduler in update.schedulers])

    def measure(self, model: SparseMaskedLM, eval_sets: dict[str, EvalSet], complete: bool) -> Evaluations:
        """Evaluates the current weights: on all eval sets under all masks, or held-out text in one round.

        The figures of the first mask round are logged, and the weights kept if they are the best yet. Raises
        Stopped where a signal asks for it: a resumed run makes up for the evaluation."""
        chosen = eval_sets if complete else {"held_out": eval_sets["held_out"]}
        evaluations = evaluate_all(model, chosen, self.accelerator, complete, self.stop.asked)
        if evaluations is None:
            self.save_and_stop()
        progress, figures = self.progress, evaluations["held_out"].first_round.summary()
        if progress.evaluated:  # of the last step already, before the best weights were loaded
            return evaluations
        self.log.event("eval", progress.step, tokens=progress.tokens, **figures)
        rounds = len(self.config.evaluate.rounds)
        part = "" if rounds == 1 else f" (mask round 1 of {rounds})"
        shown = f"held-out loss {figures['eval_loss']:.4f}, perplexity {figure(figures['perplexity'])}"
        self.log.print(f"step {progress.step}: {shown}{part}")
        if self.config.train.load_best_model_at_end and self.is_main:
            self.writer.save_best(progress.step, self.model, figures)
        progress.evaluated = True
        return evaluations

    def save(self) -> None:
        """Has a checkpoint written; returns as soon as its copy is in host memory."""
        started = time.perf_counter()
        if self.is_main:
            self.writer.save(self.progress.step, lambda: checkpoint.snapshot(self.model, self.states, self.experiment))
        blocked = time.perf_counter() - started
        self.progress.blocked += blocked
        self.log.event("checkpoint", self.progress.step, seconds_blocked=blocked)

    def save_and_stop(self) -> NoReturn:
        """The end of a run that a signal stops. Raises Stopped, or UserError without the checkpoint."""
        self.save()
        failure = self.writer.wait()
        number, failed = agree([self.stop.asked(), failure is not None], self.group)
        if failed:
            raise not_written(failure, self.directory.checkpoints)
        when = f"stopped by {signal.Signals(number).name} after step {self.progress.step}"
        flags = f"--output_dir {self.folder} --resume_from_checkpoint latest"
        raise Stopped(number, f"{when}; to resume, give the same command with {flags}")

    def save_model(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The trained model, the best or the last, as an ordinary checkpoint. Raises UserError where it cannot be
        saved, after a try to write a checkpoint at least, and where, under --on_save_error stop, the last checkpoint
        or the best weights could not be kept."""
        self.log.close()
        failure = self.writer.wait()
        step, checkpoints = self.progress.step, self.directory.checkpoints
        # The weights of the last step need not be read back where they are the best, nor be on the disk.
        if self.config.train.load_best_model_at_end and from_main(self.writer.best_step != step, self.accelerator):
            kept = checkpoint.find_best(checkpoints) if self.is_main else None
            if kept:
                checkpoint.load_weights(kept[0], self.model)
            broadcast(checkpoint.tensors(self.model).values(), self.accelerator)
            if self.is_main and (kept[1]["eval_loss"] if kept else math.inf) > self.writer.best_loss:
                whose = kept[0].name.removeprefix("best_") if kept else step
                lost = f"the best weights, of held-out loss {self.writer.best_loss:.4f}, are lost"
                failure = f"{failure or 'damaged'}; {lost}: the model has those of step {whose}"
        self.log.print(failure and f"warning: {failure}")
        try:
            self.directory.save_model(self.model, tokenizer, step)
        except Exception as error:  # from the tokenizers library a bare Exception
            self.save()
            self.log.print(self.writer.wait())
            reason = one_line(getattr(error, "strerror", None) or error)
            resumes = "; that mended, --resume_from_checkpoint latest resumes from the last checkpoint"
            then = resumes if checkpoint.steps(checkpoints) else ""
            raise UserError(f"--output_dir {self.folder}: the model could not be saved ({reason}){then}") from error
        [failed] = agree([failure is not None], self.group)
        if failed and self.stops:
            raise UserError(f"{not_written(failure, checkpoints)}; the model that could be kept is in {self.folder}")

    @contextmanager
    def analysis(self) -> Iterator[None]:
        """What comes after the model is saved: a failure in it costs a report, and is said in one line."""
        try:
            yield
        except Exception as error:
            if isinstance(error, Stopped | BrokenPipeError) or lost_a_process(error):
                raise
            base, reason = self.config.model.model_name_or_path, one_line(f"{type(error).__name__}: {error}", 200)
            again = f"scripts/evaluate.py --model_name_or_path {self.folder}{f' --compare {base}' if base else ''}"
            failed = f"the trained model is saved in {self.folder}, its analysis failed ({reason})"
            flags = "with this run's flags for text, chunks and evaluation"
            raise UserError(f"{failed}; to repeat it: python {again}, {flags}") from error

    def finish(self, results: dict[str, Any]) -> None:
        """The last line of the log; then, if asked, the Hub. Raises TrainingFailed where nothing was learnt."""
        self.log.event("end", self.progress.step, **results)
        self.log.finish_trackers()
        agree([0], self.group)  # all are here; accelerate would wait on a GPU that CPU processes do not use
        self._publish(results)
