"""The training loop: what happens around the train step.

The loop dispatches step n and then reads the metrics of step n-1, so that the device never waits for Python. Everything
that is compiled is compiled by the end of the first step: the validation loss and the sampler run once before it.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import compilation_cache
from jaxgpt.config import Config
from jaxgpt.errors import AllFailed, Interrupted, RunError
from jaxgpt.evaluation.in_training import Tasks
from jaxgpt.evaluation.loss import bits_per_byte_of_one_nat, make_validation_loss
from jaxgpt.foreign_text import printable
from jaxgpt.generation import texts
from jaxgpt.interop import initial
from jaxgpt.interop.source import Source
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.models import family
from jaxgpt.models.blocks import Params
from jaxgpt.parallel import mesh, processes
from jaxgpt.parallel.agreement import Agreement
from jaxgpt.reports import memory_plan, trackers
from jaxgpt.reports.following import Following
from jaxgpt.training import advice, ahead, corpus, everywhere, flops, peaks, resuming
from jaxgpt.training.checkpoints import Found
from jaxgpt.training.corpus import Corpus
from jaxgpt.training.decisions import Decisions
from jaxgpt.training.display import Display, silent
from jaxgpt.training.folder import RunFolder, check_name, will_resume
from jaxgpt.training.metrics_file import read_metrics
from jaxgpt.training.placement import Placement
from jaxgpt.training.saving import Writer
from jaxgpt.training.signals import Stop
from jaxgpt.training.step import BATCH_SPEC, Metrics, TrainState, needs_fixed_order


def train(config: Config) -> None:
    """Trains as the configuration says, in a new run folder, or going on in the one that is to be resumed.

    RunError if the loss becomes NaN or the disk is full, Interrupted after Ctrl-C, Terminated after SIGTERM and near
    the end of a Slurm allocation, UserError as the data raise it, where the run can't be resumed and where it doesn't
    fit the device's memory.
    """
    compilation_cache.use(config.run.compilation_cache)
    # How this process was started, and where its machine keeps programs, is none of the run's options.
    parallel = dataclasses.replace(config.parallel, processes=0, process=-1, coordinator="")
    config = dataclasses.replace(config, parallel=parallel, run=dataclasses.replace(config.run, compilation_cache=""))
    mesh.check(config)
    trackers.check(config)
    check_name(config)
    data, asked = corpus.load(config, initial.tokenizer(config))
    everywhere.check(asked, data)
    with contextlib.ExitStack() as kept:

        def open_run() -> tuple[RunFolder, Found | None]:
            # The folder's config.toml keeps what was asked for, since another machine would choose otherwise.
            folder, found = resuming.open_run(asked, data)
            kept.callback(folder.close)
            return folder, found

        # Before anybody waits for a compilation; a new folder is not made for a run that the plan may refuse.
        early = open_run() if processes.talk.from_first(lambda: will_resume(asked)) else None
        weights = initial.weights(asked, data.tokenizer)
        compute, attention = choose_attention(asked.model, asked.compute, asked.training.sequence_length)
        tasks = Tasks(asked, data.tokenizer)
        has = ahead.capacity(compute)  # before there is anything of the run's
        drawn = _drawn_meanwhile(dataclasses.replace(asked, compute=compute), has, weights)
        config, program, plan = memory_plan.prepare(dataclasses.replace(asked, compute=compute), has)
        processes.wait_for_all("compiled")  # before the first collective, which waits less long
        folder, found = early or open_run()
        with (
            Writer(folder.checkpoints, config.checkpoint) as writer,
            Display(config.training.steps, None if processes.first() else silent()) as display,
            processes.telling(),
        ):
            lines = [f"attention {attention}", *plan.lines()]
            run = _Run(config, data, folder, writer, display, program, lines, tasks, found or weights or drawn)
            folder.write_json("memory_plan.json", plan.as_json())  # now that there is nothing more to refuse
            with Following(folder, config, display.note):
                run.go()


def _drawn_meanwhile(config: Config, has: ahead.Capacity, weights: Source | None) -> Params | None:
    """The random parameters that a new run begins with, drawn while the train step is compiled or read from the cache.

    None where that isn't known yet, or where the plan may refuse the run for them alone.
    """
    shapes, _, _ = ahead.shapes(config)
    need = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.params))
    if weights or config.run.resume != "never" or processes.count() > 1 or (has.bytes is not None and need > has.bytes):
        return None
    return ahead.random_params(config)


class _Run:
    """One run's parts, and the state that changes while it goes on."""

    def __init__(
        self,
        config: Config,
        data: Corpus,
        folder: RunFolder,
        writer: Writer,
        display: Display,
        train_step: jax.stages.Compiled,
        chosen: list[str],
        tasks: Tasks,
        first: Found | Source | Params | None,
    ):
        self.config, self.data, self.folder, self.writer, self.display = config, data, folder, writer, display
        self.train_step = train_step
        self.tasks = tasks
        self.chosen = chosen  # lines on what was chosen for this machine, and what memory it takes
        self.fixed_order = needs_fixed_order(config.compute)
        self.validation_loss = make_validation_loss(config, data.validation, config.training.sequence_length)
        self.nat = bits_per_byte_of_one_nat(config, data.validation, config.training.sequence_length, data.tokenizer)
        self.placement = Placement(config)
        self.layout = self.placement.layout
        self.rows = self.layout.own_rows(config.training.batch_size)
        self.state, self.notes = self._first_state(first)
        self.frozen = None  # parameters that are not trained
        self.done = int(self.state.step)  # steps dispatched
        self.clock = 0.0  # when the last step's metrics were read
        self.stop = Stop(config.checkpoint.stop_minutes_before_end)
        self.decisions = Decisions(Agreement(self.layout), self.stop, writer, display)
        self.flops_per_token = flops.per_token(config.model, config.training.sequence_length)
        self.peak = peaks.peak(config.compute, self.layout.devices)

    def _first_state(self, first: Found | Source | Params | None) -> tuple[TrainState, list[str]]:
        """The state to begin from, and what is to be said of where it comes from."""
        if isinstance(first, Source):
            return self.placement.first_state(first.load()), initial.lines(first)
        if not isinstance(first, Found):
            return ahead.initial_state(self.config, first), []
        saved, notes = resuming.resume(self.folder, first, self.placement.saved_shapes())
        return self.placement.from_saved(saved), notes

    def go(self) -> None:
        self._introduce()
        before = ""
        if self.folder.resumes:
            self.display.resume(self.done)
        else:
            before = self._sample()
            self._evaluate()
            self._score()
        with self.stop, corpus.feed(self.data, self.config, self.done, self.rows) as self.batches:
            self._steps()
            self.display.stop()
            self.decisions.settle()
            if self.decisions.ending:
                self.display.note(f"stopping {self.decisions.ending.reason}: saving (Ctrl-C again stops at once)")
            saved = self._save()
        self.decisions.settle()
        ending, lost = self.decisions.ending, self.decisions.lost
        where = f"after step {self.done} of {self.config.training.steps}; saved in {saved}"
        if lost and (not ending or ending.error is Interrupted):  # with its terminal a run loses its output too
            raise AllFailed(f"stopped {where}, because the output can't be written: {lost}")
        if not ending or ending.error is Interrupted:
            loss = self._evaluate()
            self._score()
            after = self._sample()
            if processes.first():
                self._conclude(before, after, loss, saved)
        if ending:
            raise ending.error(f"stopped {ending.reason} {where}; --resume goes on from there")

    def _steps(self) -> None:
        training = self.config.training
        pending: tuple[Metrics, float] | None = None
        self.clock = time.perf_counter()
        while self.done < training.steps and not self.decisions.ends():
            batch = self.layout.from_processes(self.batches.next(), BATCH_SPEC)
            self.state, metrics = self.train_step(self.state, self.frozen, batch)
            self._record(self.done, pending)
            pending = metrics, self.batches.waited
            self.done += 1
            evaluate, sample = self._is_due(training.evaluate_every), self._is_due(self.config.run.sample_every)
            score, save = self._is_due(self.config.evaluation.every), self.decisions.save_is_due(self.done)
            if evaluate or score or sample or save:
                self._record(self.done, pending)
                pending = None
                if evaluate:
                    self._evaluate()
                if score:
                    self._score()
                if sample:
                    self.display.note(f"--- sample after step {self.done} ---\n{self._sample()}\n---")
                if save:
                    self.writer.save(*self._to_save())
                self.clock = time.perf_counter()
            if self.writer.problem:
                if processes.count() > 1:  # the others wait for this one's part of the checkpoint
                    raise RunError(self.writer.problem)
                self.display.note(f"{self.writer.problem}; training goes on")
                self.writer.problem = ""
        self._record(self.done, pending)

    def _is_due(self, every: int) -> bool:
        """Whether what is done every so many steps is to be done now; at the end it is done anyway."""
        return every > 0 and self.done % every == 0 and self.done < self.config.training.steps

    def _record(self, step: int, pending: tuple[Metrics, float] | None) -> None:
        """Reads the metrics of step number `step`, counted from 1, which waits until that step is done.

        With them comes how long the step waited for its batch.
        """
        if pending is None:
            return
        metrics, waited = jax.device_get(pending)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        training = self.config.training
        tokens = training.micro_batches * training.batch_size * training.sequence_length
        rate = tokens / seconds
        work = rate * self.flops_per_token
        utilisation = work / self.peak if self.peak else None
        self.folder.metric(
            step=step,
            loss=float(metrics.loss),
            learning_rate=float(metrics.learning_rate),
            grad_norm=float(metrics.grad_norm),
            loss_z=float(metrics.loss_z),
            grad_norm_z=float(metrics.grad_norm_z),
            skipped=int(metrics.skipped),
            tokens=step * tokens,
            tokens_per_second=rate,
            mfu=utilisation,
            step_seconds=seconds,
            data_wait_seconds=waited,
        )
        self.display.step(step, float(metrics.loss), rate, work, utilisation)
        if metrics.nonfinite:
            self._nonfinite(step, metrics)
        elif not metrics.taken:
            self.display.note(
                f"step {step}: a spike (z-scores: loss {metrics.loss_z:.1f}, gradient norm {metrics.grad_norm_z:.1f}); "
                "the step is skipped"
            )

    def _nonfinite(self, step: int, metrics: Metrics) -> None:
        what = "loss" if not np.isfinite(metrics.loss) else "gradient"
        value = metrics.loss if what == "loss" else metrics.grad_norm
        if metrics.nonfinite < self.config.training.stop_after_nonfinite:
            self.display.note(f"step {step}: the {what} is {value}; the step is skipped")
            return
        saved = self._save()
        if processes.first():
            self._draw_curve()
        raise AllFailed(
            f"step {step}: the {what} is {value}, so the run stops here; the last good state is in {saved}. Try "
            f"{advice.after_nonfinite(self.config, step)}"
        )

    def _evaluate(self) -> float:
        started = time.perf_counter()
        loss = self.validation_loss(self.state.params)
        bits = loss * self.nat
        self.folder.metric(step=self.done, val_loss=loss, val_bits_per_byte=bits)
        seconds = time.perf_counter() - started
        self.display.note(f"step {self.done}: validation loss {loss:.4f}, {bits:.4f} bits per byte ({seconds:.1f} s)")
        return loss

    def _score(self) -> None:
        """Scores the model on its multiple-choice tasks."""
        for result, seconds in self.tasks.results(self.config, self.state.params):
            self.folder.metric(step=self.done, **result.as_json())
            self.display.note(f"step {self.done}: {result.line()} ({seconds:.1f} s)")

    def _sample(self) -> str:
        """Draws a text, writes it to samples.txt, and returns it as it may be shown on a terminal."""
        config, data = self.config, self.data
        params = self.placement.whole_params(self.state)
        if not processes.first():
            return ""
        request = texts.Request(data.prompt, config.sampling, config.training.seed)
        pieces = texts.generate(params, [request], config.model, config.compute, data.tokenizer)
        text = printable(data.tokenizer.decode(data.prompt) + "".join(piece.text for piece in pieces))
        self.folder.sample(self.done, text)
        return text

    def _save(self) -> Path:
        """Saves to the end."""
        return self.writer.save_and_wait(*self._to_save())

    def _to_save(self) -> tuple[TrainState, dict[str, Any]]:
        return self.placement.to_save(self.state), resuming.about(self.folder, self.data)

    def _draw_curve(self) -> Path:
        from jaxgpt.reports.curves import loss_curve  # here: a start doesn't wait three quarters of a second for it

        with self.folder.replacing("loss.png") as path:
            loss_curve(read_metrics(self.folder.path / "metrics.jsonl"), self.config.run.name, path)
        return self.folder.path / "loss.png"

    def _introduce(self) -> None:
        config, training, device = self.config, self.config.training, jax.devices()[0]
        tokens = training.micro_batches * training.batch_size * training.sequence_length
        products = flops.products_per_token(config.model, training.sequence_length)
        for line in (
            f"run       {self.folder.path}",
            f"model     {family(config.model).describe(config.model)}",
            f"text      {self.data.description}, as {self.data.tokenizer.name} tokens: {len(self.data.train):,} to "
            f"train on, {len(self.data.validation):,} to validate on",
            f"training  {training.steps:,} steps of {tokens:,} tokens, {config.compute.dtype}, on {device.device_kind} "
            f"({device.platform})",
            f"a token   {self.flops_per_token:,} operations, as llm.c counts them, which "
            f"{'MFU' if self.peak else 'TFLOP/s'} is of; {products:,} in matrix products",
            *self.placement.words(),
            *self.chosen,
            *(["order     of sums is fixed: some kernels are slower ones"] if self.fixed_order else []),
            *([f"note      {config.run.note}"] if config.run.note else []),
            *self.folder.notes,
            *self.notes,
        ):
            self.display.note(line)

    def _conclude(self, before: str, after: str, loss: float, saved: object) -> None:
        for heading, text in (("before training", before), ("after training", after)):
            if text:
                self.display.note(f"\n--- sample {heading} ---\n{text}")
        self.display.note(f"\nvalidation loss  {loss:.4f}")
        self.display.note(f"loss curve       {self._draw_curve()}")
        self.display.note(f"checkpoint       {saved}")
        self.display.note(f'more text        python run.py generate --run {self.folder.path} --prompt "..."')
