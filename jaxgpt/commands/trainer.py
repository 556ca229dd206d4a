"""Training loop: takes the steps, records their metrics, and does what is due every so many of them.

The trainer dispatches step n and then reads the metrics of step n-1, so that the device never waits for Python.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.commands.batches import Batches, Evaluation, Feed, Setting
from jaxgpt.commands.display import Display
from jaxgpt.commands.stopping import Decisions, Stop
from jaxgpt.data import chat_templates
from jaxgpt.data.corpus import Described
from jaxgpt.errors import AllFailed, RunError
from jaxgpt.evaluation.registry import Tasks
from jaxgpt.foreign_text import printable
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import computed_in
from jaxgpt.models import with_scalar
from jaxgpt.models.blocks import Params
from jaxgpt.parallel import processes
from jaxgpt.reports.history import LOSSES, loss_curve
from jaxgpt.runs import resuming
from jaxgpt.runs.best import after
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.runs.saving import Writer
from jaxgpt.training import flops, spikes
from jaxgpt.training.fp8_error import Gauge
from jaxgpt.training.state import TrainState
from jaxgpt.training.step import BATCH_SPEC, Metrics


class Output(NamedTuple):
    """Destinations of a run's results, beside its folder."""

    writer: Writer
    display: Display


class Trainer:
    """Trains the setting's state with the compiled `train_step`, on what `batches` has.

    `observers` are called with the trainer and the values of each line of metrics.jsonl once it is written.
    """

    def __init__(
        self,
        setting: Setting,
        data: Described,
        batches: Batches,
        output: Output,
        train_step: jax.stages.Compiled,
        tasks: Tasks,
    ):
        config = setting.config
        training = config.training
        self.config, self.data, self.batches, self.tasks = config, data, batches, tasks
        self.folder, self.resharding, self.state = setting.folder, setting.resharding, setting.state
        self.writer, self.display = output
        self.train_step = train_step
        self.base, self.frozen = setting.base, setting.frozen  # what is not trained
        self.observers: list[Callable[[Trainer, dict[str, Any]], None]] = []
        self.writer.best = setting.best
        self._found: tuple[int, Evaluation] | None = None  # the last evaluation and its step
        self.done = int(self.state.step)  # steps dispatched
        self.clock = 0.0  # when the last step's metrics were read
        self._waited = 0.0  # seconds for batches since then
        self.stop = Stop(config.checkpoint.stop_minutes_before_end)
        self.decisions = Decisions(self.resharding.layout, self.stop, self.writer, self.display, batches.every)
        self.flops_per_token = flops.per_token(config.model, training.sequence_length)
        self.peak = flops.peak(config.compute, self.resharding.layout.devices)
        self.gauge = Gauge(config) if config.compute.products == "fp8" else None
        self.batch: Any = None  # of the last step
        # Between two steps: whether an action is due after the step of this number, and the action.
        self.actions: list[tuple[Callable[[int], bool], Callable[[], object]]] = [
            (self._every(training.evaluate_every), self.evaluate),
            (self._every(config.evaluation.every), self.score),
            (self._every(config.run.sample_every), self._show_sample),
            (self._every(config.compute.fp8_error_every if self.gauge else 0), self.measure_fp8),
            (self._save_is_due, lambda: self.writer.save(*self._to_save())),
        ]

    def _every(self, steps: int) -> Callable[[int], bool]:
        """Returns when an action is due that is taken every so many steps, and at the end of the run anyway.

        Of steps that belong together it is due after the last.
        """
        every, last = self.batches.every, self.config.training.steps

        def is_due(done: int) -> bool:
            return steps > 0 and done % every == 0 and done // steps > (done - every) // steps and done < last

        return is_due

    def _save_is_due(self, done: int) -> bool:
        """Returns whether to save after this step: by the clock and the steps, and where the model is the best yet."""
        best = self.writer.best
        is_best = self.config.checkpoint.keep_best and best is not None and best.step == done
        return self.decisions.save_is_due(done) or is_best

    @property
    def out_of_patience(self) -> bool:
        """Returns whether so many evaluations were no lower than the best that the run stops early."""
        patience, best = self.config.training.patience, self.writer.best
        return patience > 0 and best is not None and best.since >= patience

    def go(self, feed: Feed) -> None:
        """Takes the steps that are left, or those until the run is to end."""
        pending: tuple[Metrics, Mapping[str, float]] | None = None
        self.clock = time.perf_counter()
        steps = self.config.training.steps
        while self.done < steps and not self.out_of_patience and not self.decisions.ends(self.done):
            batch = self.resharding.layout.from_processes(feed.next(self.state), BATCH_SPEC)
            self._waited += feed.waited
            if self.gauge:
                if self.batch is None:
                    self.state = self.gauge.calibrated(self.state, self.frozen, batch)
                self.batch = batch
            self.state, metrics = self.train_step(self.state, self.frozen, batch)
            self._record(self.done, pending)
            pending = metrics, feed.values
            self.done += 1
            for is_due, act in self.actions:  # one by one: an evaluation may make it due to save
                if is_due(self.done):
                    self._record(self.done, pending)
                    pending = None
                    act()
                    self.clock = time.perf_counter()
            if problem := self.writer.problem:
                if processes.count() > 1:  # the others wait for this one's shards
                    raise RunError(problem)
                self.display.note(f"{problem}; training goes on")
                self.writer.problem = ""
        self._record(self.done, pending)

    def _record(self, step: int, pending: tuple[Metrics, Mapping[str, float]] | None) -> None:
        """Reads and records the metrics of step number `step`, counted from 1. Waits until that step is done.

        `pending` are the metrics, and what is to be recorded of the step's batch; None where they are recorded. The
        seconds are those since the last record. The next step's batch was waited for within them.
        """
        if pending is None:
            return
        metrics, of_batch = jax.device_get(pending)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        waited, self._waited = self._waited, 0.0
        rate = self.batches.tokens / seconds
        work = rate * self.flops_per_token
        utilisation = work / self.peak if self.peak else None
        further = {name: float(value) for name, value in (metrics.family | of_batch).items()}
        self._metric(
            step=step,
            loss=float(metrics.loss),
            learning_rate=float(metrics.learning_rate),
            grad_norm=float(metrics.grad_norm),
            loss_z=float(metrics.loss_z),
            grad_norm_z=float(metrics.grad_norm_z),
            skipped=int(metrics.skipped),
            tokens=step * self.batches.tokens,
            tokens_per_second=rate,
            mfu=utilisation,
            step_seconds=seconds,
            data_wait_seconds=waited,
            **further,
        )
        self.display.step(step, float(metrics.loss), rate, work, utilisation, self.batches.words(further))
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

    def evaluate(self) -> Evaluation:
        """Evaluates the model on what is held out; records and returns what comes of it.

        An early stop is after an evaluation, which is recorded once, also where the run was killed before its end.
        """
        if self._found and self._found[0] == self.done:
            return self._found[1]
        started, best = time.perf_counter(), self.writer.best
        found = self.batches.evaluate(self.done, self.state)
        self._found = self.done, found
        if self.out_of_patience and best and best.evaluated == self.done:
            return found
        loss = {} if found.loss is None else {"val_loss": found.loss}
        if found.loss is not None:
            self.writer.best = after(best, self.done, found.loss)
        self._metric(step=self.done, **loss, **found.values)
        seconds = time.perf_counter() - started
        words = found.words if found.loss is None else f"validation loss {found.loss:.4f}, {found.words}"
        self.display.note(f"step {self.done}: {words} ({seconds:.1f} s)")
        return found

    def measure_fp8(self) -> None:
        """Measures how far the gradient by products of 8 bits is from that without."""
        assert self.gauge
        errors = self.gauge.errors(self.state, self.frozen, self.batch)
        self._metric(step=self.done, **errors)
        self.display.note(f"step {self.done}: the gradient by products of 8 bits is {errors['fp8_error']:.1%} off")

    def score(self) -> None:
        """Scores the model on its tasks."""
        params = self.state.params
        for result, seconds in self.tasks.results(
            self.config, params, self.frozen, lambda: self._params_to_draw_with(None)
        ):
            self._metric(step=self.done, **result._asdict())
            self.display.note(f"step {self.done}: {result.line()} ({seconds:.1f} s)")

    def sample(self) -> str:
        """Draws a text, appends it to samples.txt, and returns it with control characters escaped.

        Returns nothing where the model draws no text.
        """
        config, data = self.config, self.data
        if data.prompt is None:
            return ""
        (params,) = self._params_to_draw_with()
        if not processes.first():
            return ""
        sampling = dataclasses.replace(config.sampling, stop=config.sampling.stop + chat_templates.stops(data.template))
        request = batching.Request(data.prompt, sampling, config.training.seed)
        pieces = batching.generate(params, [request], config.model, config.compute, data.tokenizer)
        text = printable(data.tokenizer.prompt_text(data.prompt) + "".join(piece.text for piece in pieces))
        self.folder.sample(self.done, text)
        return text

    def _params_to_draw_with(self, most: int | None = 1) -> list[Params]:
        """Gathers the model's parameters on this process's devices, or the first `most` of them.

        All processes have to call it together.
        """
        dtype = computed_in(self.config.compute).dtype
        found = self.resharding.whole_params_on_each(self.state, self.frozen, most, dtype)
        return [with_scalar.model_of(params) if self.config.objective.scalar_head else params for params in found]

    def _show_sample(self) -> None:
        if self.data.prompt is not None:
            self.display.note(f"--- sample after step {self.done} ---\n{self.sample()}\n---")

    def save(self) -> Path:
        """Saves the state, waits until it is on the disk, and returns the checkpoint's path."""
        return self.writer.save_and_wait(*self._to_save())

    def _to_save(self) -> tuple[TrainState, dict[str, Any]]:
        kept = self.batches.to_keep(self.done, self.state)
        return self.resharding.to_save(self.state), resuming.about(
            self.folder, self.data, self.base, kept, self.writer.best
        )

    def draw_curve(self) -> Path:
        with self.folder.replacing("loss.png") as path:
            unit = LOSSES[self.config.objective.name]
            loss_curve(read_metrics(self.folder.path / "metrics.jsonl"), self.config.run.name, path, unit)
        return self.folder.path / "loss.png"
