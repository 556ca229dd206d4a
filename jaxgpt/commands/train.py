"""`run.py`: the course of a training run.

1. Read the data that the configuration names, and complete it from them and from given weights (`batches.py`).
2. Decide how the run begins: from its own checkpoint, from given weights, or from random ones.
3. Compile the train step and plan its memory. What doesn't fit is refused here, before anything is written.
4. Open the run's folder and make the first state.
5. Train: `trainer.py` takes the steps.
6. Save, evaluate, draw a sample and the loss curve.

Everything that is compiled is compiled by the end of the first step: the evaluation and the sampler run once before
it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxgpt import compilation_cache, environment
from jaxgpt.commands import configuration, other_times
from jaxgpt.commands.batches import Evaluation, Setting, Source, open_source
from jaxgpt.commands.display import Display, silent
from jaxgpt.commands.trainer import Output, Trainer
from jaxgpt.data.corpus import Described
from jaxgpt.errors import AllFailed, Interrupted, UserError
from jaxgpt.evaluation.registry import Tasks
from jaxgpt.interop import bases
from jaxgpt.interop.tensors import AdapterSource, WeightSource
from jaxgpt.kernels import choose
from jaxgpt.models import family, lora
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel import mesh, processes
from jaxgpt.reports import trackers
from jaxgpt.reports.live_report import Following
from jaxgpt.runs import best, folder, resuming
from jaxgpt.runs.best import Best
from jaxgpt.runs.checkpoints import Found
from jaxgpt.runs.folder import RunFolder, check_name, will_resume
from jaxgpt.runs.saving import Writer
from jaxgpt.terminal import command
from jaxgpt.training import device_memory, fit, host_memory, memory_plan, step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import Base, TrainState, initial_state, random_params, with_head

Observer = Callable[[Trainer, dict[str, Any]], None]


def train(config: Config, *observers: Observer) -> None:
    """Trains as the configuration says, in a new run folder or, resuming, in the existing one.

    The observers are called with the trainer and the values of each line of metrics.jsonl once it is written.

    Raises:
        RunError: The loss became NaN, or the disk is full.
        Interrupted: Ctrl-C; Terminated after SIGTERM and near the end of a Slurm allocation.
        UserError: The data can't be read, the run can't be resumed, or it doesn't fit the device's memory.
    """
    source = open_source(_of_the_run(config))
    data, asked = source.data, source.config
    configuration.check_processes(asked, data)
    with contextlib.ExitStack() as kept:
        beginning = begin(asked, data, kept)
        tasks = Tasks(asked, data.tokenizer, data.template)
        program, beginning = _compile(asked, beginning)
        config = program.config
        processes.wait_for_all("compiled")  # before the first collective, whose timeout is shorter
        if beginning.folder is None:
            beginning = _open(asked, data, kept, beginning)
        folder = beginning.folder
        assert folder is not None
        with (
            Writer(folder.checkpoints, config.checkpoint) as writer,
            Display(config.training.steps, None if processes.first() else silent()) as display,
            processes.telling(),
        ):
            resharding = Resharding(config)
            state, notes = _first_state(config, resharding, beginning)
            base = _base(resharding, beginning)
            kept = beginning.checkpoint.about["kept"] if beginning.checkpoint else {}
            setting = Setting(config, folder, resharding, state, base, kept, display.note, _best(config, beginning))
            batches = source.batches(setting)
            trainer = Trainer(setting, data, batches, Output(writer, display), program.step, tasks)
            trainer.observers += observers
            folder.write_json("memory_plan.json", program.plan.as_json())  # now that nothing can be refused any more
            with Following(folder, config, display.note) as following:
                trainer.observers.append(lambda _, values: following.observe(values))
                _introduce(trainer, source, program, notes)
                writer.mark_best()
                _run(trainer, source)


def _of_the_run(config: Config) -> Config:
    """Returns the options without those of this machine alone, which it follows here. UserError for wrong ones."""
    compilation_cache.use(config.run.compilation_cache)
    # How this process was started, and where its machine keeps programs, are no options of the run.
    alone = {"processes": 0, "process": -1, "coordinator": ""}
    config = changed(config, parallel=alone, run={"compilation_cache": ""})
    for check in (mesh.check, host_memory.check, trackers.check, check_name, _check_policy):
        check(config)
    return config


def _check_policy(config: Config) -> None:
    """Raises a UserError for an option that can't be of use to a policy, which learns from what it drew itself."""
    if config.objective.name != "policy":
        return
    for option, value, why in (
        ("--model.dropout", config.model.dropout, "the probabilities of what is drawn are without it"),
        ("--checkpoint.keep-best", config.checkpoint.keep_best, "its evaluations are rewards and no losses"),
        ("--training.patience", config.training.patience, "its evaluations are rewards and no losses"),
    ):
        if value:
            raise UserError(f"{option}: leave it away with --objective.name policy, since {why}")


class Beginning(NamedTuple):
    """The beginning of a run: a checkpoint of its own, else given weights, else random ones.

    The folder of a resumed run is open from the start, so that nobody waits for a compilation to hear that it can't be
    resumed. A new folder is not made for a run that the memory plan may refuse.
    """

    checkpoint: Found | None = None
    weights: WeightSource | None = None
    base: WeightSource | None = None  # of adapters: the weights that are not trained
    adapters: AdapterSource | None = None  # that are trained on, or None for new ones
    random: Params | None = None  # drawn while the train step is compiled, or None
    folder: RunFolder | None = None


def begin(asked: Config, data: Described, kept: contextlib.ExitStack) -> Beginning:
    """Decides how the run begins. UserError where it can't be resumed, or where the weights don't fit it."""
    if processes.talk.broadcast(lambda: will_resume(asked)):
        beginning = _open(asked, data, kept, Beginning())
        return beginning._replace(base=configuration.weights(asked, data.tokenizer)) if asked.lora.rank else beginning
    weights = configuration.weights(asked, data.tokenizer)
    if not asked.lora.rank:
        return Beginning(weights=weights)
    adapters = configuration.adapters(asked) if asked.lora.adapters else None
    if weights and adapters and adapters.fingerprint:
        bases.check_beside(adapters, weights)  # now, before there is a folder
    return Beginning(base=weights, adapters=adapters)


def _open(asked: Config, data: Described, kept: contextlib.ExitStack, beginning: Beginning) -> Beginning:
    """Opens the run's folder. Its config.toml keeps what was asked for: another machine would choose otherwise."""
    folder, found = resuming.open_run(asked, data)
    kept.callback(folder.close)
    return beginning._replace(folder=folder, checkpoint=found)


def _first_state(config: Config, resharding: Resharding, beginning: Beginning) -> tuple[TrainState, list[str]]:
    """Returns the state to begin from, and lines that say where it comes from."""
    if beginning.checkpoint:
        assert beginning.folder is not None
        saved, notes = resuming.resume(beginning.folder, beginning.checkpoint, resharding.saved_shapes())
        return resharding.from_saved(saved), notes
    if beginning.weights:
        weights = with_head(beginning.weights.load(), config)
        return resharding.first_state(weights), configuration.about_weights(beginning.weights)
    notes = configuration.about_weights(beginning.base) if beginning.base else []
    if beginning.adapters:
        return resharding.first_state(with_head(beginning.adapters.load(), config)), [
            *notes,
            f"adapters  from {config.lora.adapters}",
        ]
    return initial_state(config, beginning.random), notes


def _base(resharding: Resharding, beginning: Beginning) -> Base | None:
    """Returns the frozen base on the devices, where adapters are trained.

    UserError where the checkpoint that the run goes on from has adapters of another base.
    """
    if beginning.base is None:
        return None
    weights = beginning.base.load()
    base = Base(resharding.placed_base(weights), bases.fingerprint(weights))
    if beginning.checkpoint:
        bases.check(beginning.checkpoint, base.fingerprint)
    return base


def _best(config: Config, beginning: Beginning) -> Best | None:
    """Returns the lowest validation loss before the run was resumed; None for a new run."""
    found, folder, keep = beginning.checkpoint, beginning.folder, config.checkpoint.keep_best
    if found is None or folder is None:
        return None
    step, values = found.about["step"], found.about["best"]
    said = processes.talk.broadcast(lambda: best.resumed(folder.checkpoints, step, values, keep=keep))
    return said and Best(*said)  # a list, as it comes from process 0


class Program(NamedTuple):
    """The compiled train step, and what was chosen for this machine."""

    config: Config
    step: jax.stages.Compiled
    attention: str  # a line that describes it
    plan: memory_plan.Plan
    choice: list[str]  # lines about what `compute.fit` chose


def _compile(asked: Config, beginning: Beginning) -> tuple[Program, Beginning]:
    """Completes the configuration with this machine's attention and what fits its memory, and compiles the train step.

    UserError where the run doesn't fit the device's memory. The message says what would make it fit.
    """
    config, attention = configuration.with_attention(asked)
    if config.compute.fit:
        environment.give_memory_back()
    has = fit.capacity(config)  # before the run allocates anything
    if _may_draw(config, has, beginning):
        beginning = beginning._replace(random=random_params(config))
    fitted = fit.prepare(config, has, other_times.of_run(config))
    return Program(fitted.config, fitted.program, attention, fitted.plan, fitted.lines), beginning


def _may_draw(config: Config, has: device_memory.Capacity, beginning: Beginning) -> bool:
    """Returns whether random parameters may be drawn while the train step is compiled or read from the cache.

    They may not where given weights or a checkpoint may take their place, where `compute.fit` may yet choose another
    layout for them, nor where the plan may refuse the run for the parameters alone.
    """
    if (
        config.compute.fit
        or beginning.weights
        or beginning.base
        or config.run.resume != "never"
        or processes.count() > 1
    ):
        return False
    shapes, _, _ = step.shapes(config)
    need = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.params))
    return has.bytes is None or need <= has.bytes


def _run(trainer: Trainer, source: Source) -> None:
    """Takes all steps, with an evaluation, a score and a sample before the first and after the last."""
    config, display, decisions = trainer.config, trainer.display, trainer.decisions
    before = ""
    if trainer.folder.resumes:
        display.resume(trainer.done)
    else:
        before = trainer.sample()
        trainer.evaluate()
        trainer.score()
    rows = trainer.resharding.layout.own_rows(config.training.batch_size)
    with trainer.stop, trainer.batches.feed(trainer.done, rows) as feed:
        trainer.go(feed)
        display.stop()
        decisions.settle()
        if decisions.ending:
            display.note(f"stopping {decisions.ending.reason}: saving (Ctrl-C again stops at once)")
        saved = trainer.save()
    decisions.settle()
    ending, lost = decisions.ending, decisions.lost
    where = f"after step {trainer.done} of {config.training.steps}; saved in {saved}"
    if lost and (not ending or ending.error is Interrupted):  # a closed terminal (SIGHUP) takes the output with it
        raise AllFailed(f"stopped {where}, because the output can't be written: {lost}")
    if not ending or ending.error is Interrupted:
        found = trainer.evaluate()
        trainer.writer.mark_best(at_end=True)
        trainer.score()
        after = trainer.sample()
        if processes.first():
            _conclude(trainer, before, after, found, saved, source)
    if ending:
        on = command("--resume", trainer.folder.path, *_typed_anew(config))
        raise ending.error(f"stopped {ending.reason} {where}. To go on: {on}")


def _about_best(trainer: Trainer) -> list[str]:
    """Returns lines that say why the run stopped early, and which checkpoint is the best, where it was asked to."""
    found, lines = trainer.writer.best, []
    if found is None:
        return []
    when = f"after step {found.step}" if found.step else "before the first step"
    if trainer.out_of_patience:
        lines.append(
            f"stopped early    after step {trainer.done}: {found.since} evaluations without a lower validation loss "
            f"than {found.loss:.4f}, {when} (--training.patience)"
        )
    if trainer.config.checkpoint.keep_best and found.step:
        path = trainer.folder.checkpoints / "best"
        lines.append(f"best checkpoint  {path}: {when}, validation loss {found.loss:.4f}")
    elif trainer.config.checkpoint.keep_best:
        lines.append(f"best checkpoint  none: the validation loss was lowest {when}, at {found.loss:.4f}")
    return lines


def _typed_anew(config: Config) -> list[str]:
    """Returns the options that a run's config.toml doesn't bring along."""
    given = ["--run.trackers", config.run.trackers] if config.run.trackers else []
    return [*given, "--objective.reward", config.objective.reward] if config.objective.rewarded_by_a_program else given


def _introduce(trainer: Trainer, source: Source, program: Program, notes: list[str]) -> None:
    """Shows what is trained and where, in five lines and those of what isn't usual; writes all into START."""
    config, data, device, plan = trainer.config, trainer.data, jax.devices()[0], program.plan
    in_fixed_order = config.compute.deterministic and device.platform == "gpu"
    first = [
        f"run       {trainer.folder.path}",
        f"model     {family(config.model).describe(config.model)}",
        f"text      {source.about()}",
        f"training  {config.training.steps:,} steps of {trainer.batches.tokens:,} tokens, {config.compute.dtype}, on "
        f"{device.device_kind} ({device.platform})",
        *_about_adapters(config),
        *_about_products(config),
        *trainer.resharding.words(),
        *([f"attention {program.attention}"] if device.platform != "cpu" else []),
        f"memory    {plan.summary()}; all there is to say: {folder.START} in the run's folder, or --verbose",
        *program.choice,
        *([f"note      {config.run.note}"] if config.run.note else []),
        *(f"note      {line}" for line in data.notes),
        *trainer.folder.notes,
        *notes,
    ]
    more = [
        *_about_flops(trainer),
        *([f"attention {program.attention}"] if device.platform == "cpu" else []),
        *plan.lines(),
        *(["order     of sums is fixed: some kernels are slower ones"] if in_fixed_order else []),
    ]
    trainer.folder.write_text(folder.START, "\n".join([*first, *more]) + "\n")
    for line in [*first, *(more if config.run.verbose else [])]:
        trainer.display.note(line)


def _about_flops(trainer: Trainer) -> list[str]:
    config = trainer.config
    products = family(config.model).flops_per_token(config.model, config.training.sequence_length)
    return [
        f"FLOPs     per token: {trainer.flops_per_token:,} as llm.c counts them, for "
        f"{'MFU' if trainer.peak else 'TFLOP/s'}; {products:,.0f} in matrix products, forward and backward"
    ]


def _about_products(config: Config) -> list[str]:
    """Returns a line about products of 8 bits, and whether this device has them."""
    if config.compute.products != "fp8":
        return []
    scaled = f"by the last {config.compute.fp8_history} steps" if config.compute.fp8_scaling == "delayed" else "anew"
    native = choose.multiplies_8_bits()
    where = "" if native else "; this device multiplies them in a wider type, which is no faster"
    peak = f"; MFU is of the peak in {config.compute.dtype}" if native else ""
    return [f"products  of the blocks' weights in 8 bits (e4m3, gradients e5m2), scaled {scaled}{where}{peak}"]


def _about_adapters(config: Config) -> list[str]:
    if not config.lora.rank:
        return []
    trained, scales = lora.parameter_count(config.model, config.lora), config.lora.double_quantization
    names = ", ".join(lora.chosen(config.model, config.lora.targets))
    return [
        f"adapters  of rank {config.lora.rank}: {trained:,} parameters are trained, beside {names}; the base stays as "
        f"it is, in {config.lora.base}{' with scales in 8 bits' if scales else ''}"
    ]


def _conclude(trainer: Trainer, before: str, after: str, found: Evaluation, saved: object, source: Source) -> None:
    note = trainer.display.note
    for heading, text in (("before", before), ("after", after)):
        if text:
            note(f"\n--- sample {heading} training ---\n{text}")
    note(f"\nheld out         {found.words}" if found.loss is None else f"\nvalidation loss  {found.loss:.4f}")
    note(f"loss curve       {trainer.draw_curve()}")
    note(f"checkpoint       {saved}")
    for line in _about_best(trainer):
        note(line)
    what, words = source.afterwards(str(trainer.folder.path))
    note(f"{what:17}{command(*words)}")
