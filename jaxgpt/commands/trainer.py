"""Training loop: takes the steps, records their metrics, and does what is due every so many of them.

The trainer dispatches step n and then reads the metrics of step n-1, so that the device never waits for Python.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.commands.display import Display
from jaxgpt.commands.stopping import Decisions, Stop
from jaxgpt.data import chat_templates
from jaxgpt.data.corpus import Corpus
from jaxgpt.errors import AllFailed, RunError
from jaxgpt.evaluation.registry import Tasks
from jaxgpt.evaluation.scoring import bits_per_byte_of_one_nat, make_validation_loss
from jaxgpt.foreign_text import printable
from jaxgpt.generation import batching
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.reports.history import loss_curve
from jaxgpt.runs import resuming
from jaxgpt.runs.folder import RunFolder
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.runs.saving import Writer
from jaxgpt.training import flops, spikes
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import Base, TrainState
from jaxgpt.training.step import BATCH_SPEC, Metrics


class Output(NamedTuple):
    """Destinations of a run's results."""

    folder: RunFolder
    writer: Writer
    display: Display


class Trainer:
    """Trains `state` with the compiled `train_step`.

    `observers` are called with the trainer and the values of each line of metrics.jsonl once it is written.
    """

    def __init__(
        self,
        config: Config,
        data: Corpus,
        output: Output,
        train_step: jax.stages.Compiled,
        resharding: Resharding,
        state: TrainState,
        base: Base | None,
        tasks: Tasks,
    ):
        training = config.training
        self.config, self.data, self.resharding, self.tasks = config, data, resharding, tasks
        self.folder, self.writer, self.display = output
        self.train_step, self.state = train_step, state
        self.base, self.frozen = base, None if base is None else base.params  # what is not trained
        self.observers: list[Callable[[Trainer, dict[str, Any]], None]] = []
        self.validation_loss = make_validation_loss(config, data.validation, training.sequence_length, self.frozen)
        self.nat = bits_per_byte_of_one_nat(config, data.validation, training.sequence_length, data.tokenizer)
        self.done = int(state.step)  # steps dispatched
        self.clock = 0.0  # when the last step's metrics were read
        self.stop = Stop(config.checkpoint.stop_minutes_before_end)
        self.decisions = Decisions(resharding.layout, self.stop, self.writer, self.display)
        self.tokens = training.micro_batches * training.batch_size * training.sequence_length  # per step
        self.flops_per_token = flops.per_token(config.model, training.sequence_length)
        self.peak = flops.peak(config.compute, resharding.layout.devices)
        # Between two steps: whether an action is due after the step of this number, and the action.
        self.actions: list[tuple[Callable[[int], bool], Callable[[], object]]] = [
            (self._every(training.evaluate_every), self.evaluate),
            (self._every(config.evaluation.every), self.score),
            (self._every(config.run.sample_every), self._show_sample),
            (self.decisions.save_is_due, lambda: self.writer.save(*self._to_save())),
        ]

    def _every(self, steps: int) -> Callable[[int], bool]:
        """Returns when an action is due that is taken every so many steps, and at the end of the run anyway."""
        return lambda done: steps > 0 and done % steps == 0 and done < self.config.training.steps

    def go(self, batches: Any) -> None:
        """Takes the steps that are left, or those until the run is to end."""
        pending: tuple[Metrics, float] | None = None
        self.clock = time.perf_counter()
        while self.done < self.config.training.steps and not self.decisions.ends():
            batch = self.resharding.layout.from_processes(batches.next(), BATCH_SPEC)
            self.state, metrics = self.train_step(self.state, self.frozen, batch)
            self._record(self.done, pending)
            pending = metrics, batches.waited
            self.done += 1
            if due := [act for is_due, act in self.actions if is_due(self.done)]:
                self._record(self.done, pending)
                pending = None
                for act in due:
                    act()
                self.clock = time.perf_counter()
            if problem := self.writer.problem:
                if processes.count() > 1:  # the others wait for this one's shards
                    raise RunError(problem)
                self.display.note(f"{problem}; training goes on")
                self.writer.problem = ""
        self._record(self.done, pending)

    def _record(self, step: int, pending: tuple[Metrics, float] | None) -> None:
        """Reads and records the metrics of step number `step`, counted from 1. Waits until that step is done.

        `pending` are the metrics and the seconds that the step waited for its batch; None where they are recorded.
        """
        if pending is None:
            return
        metrics, waited = jax.device_get(pending)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        rate = self.tokens / seconds
        work = rate * self.flops_per_token
        utilisation = work / self.peak if self.peak else None
        self._metric(
            step=step,
            loss=float(metrics.loss),
            learning_rate=float(metrics.learning_rate),
            grad_norm=float(metrics.grad_norm),
            loss_z=float(metrics.loss_z),
            grad_norm_z=float(metrics.grad_norm_z),
            skipped=int(metrics.skipped),
            tokens=step * self.tokens,
            tokens_per_second=rate,
            mfu=utilisation,
            step_seconds=seconds,
            data_wait_seconds=waited,
            **{name: float(value) for name, value in metrics.family.items()},
        )
        self.display.step(step, float(metrics.loss), rate, work, utilisation)
        if metrics.nonfinite:
            self._nonfinite(step, metrics)
        elif not metrics.taken:
            self.display.note(
                f"step {step}: a spike (z-scores: loss {metrics.loss_z:.1f}, gradient norm {metrics.grad_norm_z:.1f}); "
                "the step is skipped"
            )

    def _metric(self, **values: Any) -> None:
        self.folder.metric(**values)
        for observe in self.observers:
            observe(self, values)

    def _nonfinite(self, step: int, metrics: Metrics) -> None:
        what = "loss" if not np.isfinite(metrics.loss) else "gradient"
        value = metrics.loss if what == "loss" else metrics.grad_norm
        if metrics.nonfinite < self.config.training.stop_after_nonfinite:
            self.display.note(f"step {step}: the {what} is {value}; the step is skipped")
            return
        saved = self.save()
        if processes.first():
            self.draw_curve()
        raise AllFailed(
            f"step {step}: the {what} is {value}, so the run stops here; the last good state is in {saved}. Try "
            f"{spikes.advice_after_nonfinite(self.config, step)}"
        )

    def evaluate(self) -> float:
        """Computes, records and returns the validation loss, in nats per token."""
        started = time.perf_counter()
        loss = self.validation_loss(self.state.params)
        bits = loss * self.nat
        self._metric(step=self.done, val_loss=loss, val_bits_per_byte=bits)
        seconds = time.perf_counter() - started
        self.display.note(f"step {self.done}: validation loss {loss:.4f}, {bits:.4f} bits per byte ({seconds:.1f} s)")
        return loss

    def score(self) -> None:
        """Scores the model on its tasks."""
        whole = functools.partial(self.resharding.whole_params, self.state, self.frozen)
        for result, seconds in self.tasks.results(self.config, self.state.params, self.frozen, whole):
            self._metric(step=self.done, **result._asdict())
            self.display.note(f"step {self.done}: {result.line()} ({seconds:.1f} s)")

    def sample(self) -> str:
        """Draws a text, appends it to samples.txt, and returns it with control characters escaped."""
        config, data = self.config, self.data
        params = self.resharding.whole_params(self.state, self.frozen)
        if not processes.first():
            return ""
        sampling = dataclasses.replace(config.sampling, stop=config.sampling.stop + chat_templates.stops(data.template))
        request = batching.Request(data.prompt, sampling, config.training.seed)
        pieces = batching.generate(params, [request], config.model, config.compute, data.tokenizer)
        text = printable(data.tokenizer.prompt_text(data.prompt) + "".join(piece.text for piece in pieces))
        self.folder.sample(self.done, text)
        return text

    def _show_sample(self) -> None:
        self.display.note(f"--- sample after step {self.done} ---\n{self.sample()}\n---")

    def save(self) -> Path:
        """Saves the state, waits until it is on the disk, and returns the checkpoint's path."""
        return self.writer.save_and_wait(*self._to_save())

    def _to_save(self) -> tuple[TrainState, dict[str, Any]]:
        return self.resharding.to_save(self.state), resuming.about(self.folder, self.data, self.base)

    def draw_curve(self) -> Path:
        with self.folder.replacing("loss.png") as path:
            loss_curve(read_metrics(self.folder.path / "metrics.jsonl"), self.config.run.name, path)
        return self.folder.path / "loss.png"
