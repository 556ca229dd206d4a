"""`compute.fit`: the candidates, the search among them with programs of any size, and the choice with real ones."""

import dataclasses
import functools
import itertools
import random
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxgpt.errors import UserError
from jaxgpt.models.blocks import RECOMPUTE_LEVELS
from jaxgpt.options import fit as options
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.options.settings import changed
from jaxgpt.parallel import processes
from jaxgpt.training import estimate, fit, memory_plan, step
from jaxgpt.training.candidates import Candidate, Place, _micro_batches, candidates, open_options
from jaxgpt.training.device_memory import CARDS, Capacity
from jaxgpt.training.memory_plan import Else
from jaxgpt.training.step_time import CPU, speeds_of, step_seconds
from tests.nightly import nightly

CONFIG = Config(
    model=Model(layers=3, heads=2, width=16, context=32, vocabulary_size=130),
    compute=Compute(fit="1GB", classifier_chunk=256, attention="blocks", attention_block=16),
    training=Training(batch_size=16, micro_batches=3, sequence_length=32, evaluation_batches=2),
)
ONE = Place(1, gpu=False, hosts=False, speeds=CPU)
H100 = speeds_of(CARDS["h100"], "float32")
FOUR = Place(4, gpu=True, hosts=True, speeds=H100)


def kept(*names: str, **sections) -> Config:
    return changed(CONFIG, compute={"fit_keeps": names, **sections.pop("compute", {})}, **sections)


# Candidates


@pytest.mark.parametrize("place", [ONE, FOUR])
def test_every_candidate_is_the_same_run(place):
    """A step and a validation loss have the same sequences, and options that aren't free keep their values."""
    found = candidates(CONFIG, place)
    assert len(found) > 3
    for one in (one.config for one in found):
        training = one.training
        assert training.batch_size * training.micro_batches == 48
        assert training.batch_size * training.evaluation_batches == 32
        assert training.batch_size % place.devices == 0
        nothing = {"batch_size": 0, "micro_batches": 0, "evaluation_batches": 0}
        assert dataclasses.replace(training, **nothing) == dataclasses.replace(CONFIG.training, **nothing)
        assert (one.model, one.data, one.optimizer) == (CONFIG.model, CONFIG.data, CONFIG.optimizer)
        assert one.compute.dtype == CONFIG.compute.dtype


def test_they_come_fastest_first_and_each_needs_less():
    found = candidates(CONFIG, FOUR)
    for faster, slower in itertools.pairwise(found):
        assert faster.seconds <= slower.seconds
        assert faster.bytes > slower.bytes


def test_micro_batches_are_all_that_divide():
    """A step's sequences, a validation loss's, and among the devices; found at once however many they are."""
    for batch_size, micro_batches, batches, devices in ((16, 3, 2, 4), (7, 3, 0, 1), (6, 4, 10, 2), (9, 1, 1, 9)):
        cut = {"batch_size": batch_size, "micro_batches": micro_batches, "evaluation_batches": batches}
        sequences, validated = batch_size * micro_batches, batch_size * batches
        all_sizes = range(sequences, 0, -1)
        sizes = [size for size in all_sizes if sequences % size == validated % size == size % devices == 0]
        assert _micro_batches(changed(CONFIG, training=cut), devices) == sizes
    huge = changed(CONFIG, training={"batch_size": 2**31 - 1, "micro_batches": 1, "evaluation_batches": 1})
    assert _micro_batches(huge, 1) == [2**31 - 1, 1]


def test_a_search_traces_the_parameters_a_few_times(monkeypatch):
    """The number of candidates doesn't matter: a trace takes longer than all else of an estimate."""
    traced = []
    whole = estimate.layout_without_devices
    monkeypatch.setattr(estimate, "layout_without_devices", lambda *args: traced.append(args) or whole(*args))
    muon = changed(CONFIG, optimizer={"name": "muon", "momentum": 0.9})  # of no other test
    candidates(muon, ONE)
    assert len(traced) <= 4


def test_what_is_kept_stays():
    names = ("training.micro_batches", "compute.recompute", "parallel.zero", "parallel.moments")
    found = candidates(kept(*names), FOUR)
    assert {one.config.training.batch_size for one in found} == {16}
    assert {one.config.compute.recompute for one in found} == {"norms"}
    assert {(one.config.parallel.zero, one.config.parallel.moments) for one in found} == {(0, "device")}
    assert open_options(kept(*names), FOUR) == ["compute.classifier_chunk"]


def test_one_device_has_nothing_to_shard_and_a_cpu_no_other_memory():
    assert open_options(CONFIG, ONE) == ["training.micro_batches", "compute.recompute", "compute.classifier_chunk"]
    assert open_options(CONFIG, FOUR) == list(options.FREE)


def test_reproducible_runs_stay_so():
    """Eight virtual shards in every micro-batch, and nothing sharded."""
    config = changed(CONFIG, parallel={"reproducible": True})
    found = candidates(config, FOUR)
    assert {one.config.parallel.zero for one in found} == {0}
    assert all(one.config.training.batch_size % 8 == 0 for one in found)


def test_what_costs_time_costs_time():
    """Additional micro-batches, levels, chunks, stages and transfers take longer, all else the same."""
    seconds = functools.partial(step_seconds, devices=4, speeds=H100)
    plain = seconds(CONFIG)
    assert plain < seconds(changed(CONFIG, training=options.split(CONFIG, 4)))
    assert plain < seconds(changed(CONFIG, compute={"classifier_chunk": 32}))
    assert plain < seconds(changed(CONFIG, parallel={"moments": "host"}))
    levels = [seconds(changed(CONFIG, compute={"recompute": level})) for level in RECOMPUTE_LEVELS]
    assert levels == sorted(levels)
    stages = [seconds(changed(CONFIG, parallel={"zero": zero})) for zero in (2, 3)]
    assert plain < stages[0] < stages[1]


def test_what_else_a_run_needs_counts():
    """A candidate needs the most that is there at any time: a step and what is beside it, or another time."""
    alone = candidates(kept(*options.FREE), ONE)[0].bytes
    assert candidates(kept(*options.FREE), ONE, lambda _: Else({"a": 5, "b": 2}, {}))[0].bytes == alone + 7
    assert candidates(kept(*options.FREE), ONE, lambda _: Else({"a": 5}, {"c": 10**9}))[0].bytes == 10**9


# The search, with programs of any size


class Programs:
    """Stands in for the compiler: a program takes its estimate times a factor of its own."""

    def __init__(self, monkeypatch, found: list[Candidate], factor):
        self.found, self.factor, self.compiled = found, factor, []
        monkeypatch.setattr(step, "compile_step", self.compile)
        monkeypatch.setattr(memory_plan, "least", lambda _: 0)

    def needs(self, one: Candidate) -> int:
        return int(one.bytes * self.factor(one.config))

    def compile(self, config: Config):
        one = next(one for one in self.found if one.config == config)
        self.compiled.append(one)
        sizes = {"argument": self.needs(one), "temp": 0, "output": 0, "alias": 0, "generated_code": 0}
        named = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**named, host_argument_size_in_bytes=0))


def searched(monkeypatch, factor, room: int):
    found = candidates(CONFIG, ONE)
    programs = Programs(monkeypatch, found, factor)
    best = fit._Search(found, Capacity(room, "--compute.fit"), lambda _: memory_plan.NOTHING_ELSE).run()
    return programs, best


@pytest.mark.parametrize("seed", nightly(range(20), every_time=range(6)))
def test_the_choice_fits_and_few_programs_are_compiled(monkeypatch, seed):
    """Estimates are 30% too large to 10% too small, by levels: where one fits at all, one is taken that does."""
    draw = random.Random(seed)
    wrong = {level: draw.uniform(0.77, 1.1) for level in RECOMPUTE_LEVELS}
    found = candidates(CONFIG, ONE)
    room = draw.randint(found[-1].bytes // 2, found[0].bytes)
    programs, best = searched(monkeypatch, lambda config: wrong[config.compute.recompute], room)
    fitting = [one for one in programs.found if programs.needs(one) <= room]
    assert len(programs.compiled) <= fit.MOST_COMPILED + 1
    if best is None:
        assert found[-1] not in fitting
    else:
        assert best in fitting
        assert not [one for one in programs.compiled if one in fitting and found.index(one) < found.index(best)]


@pytest.mark.parametrize("wrong", nightly([0.8, 1.0, 1.25], every_time=[1.25]))
def test_where_estimates_are_wrong_by_the_same_factor_the_fastest_is_taken(monkeypatch, wrong):
    found = candidates(CONFIG, ONE)
    for wanted in found[:: len(found) // 4]:
        programs, best = searched(monkeypatch, lambda _: wrong, int(wanted.bytes * wrong) + 1)
        assert best == wanted
        assert wanted in programs.compiled[:3]


def test_all_processes_go_by_the_largest_need(monkeypatch):
    """Another process's program needs twice as much, so this one takes a smaller one too."""
    room = candidates(CONFIG, ONE)[0].bytes
    assert searched(monkeypatch, lambda _: 1.0, room)[1] == candidates(CONFIG, ONE)[0]
    monkeypatch.setattr(processes, "talk", SimpleNamespace(all_gather=lambda own: [own, 2 * own]))
    programs, best = searched(monkeypatch, lambda _: 1.0, room)
    assert best is not None
    assert 2 * programs.needs(best) <= room


# With real programs


@pytest.fixture(autouse=True)
def compiled_once(programs_of_this_file):
    """Each program is compiled once for all tests."""


@pytest.fixture(scope="module")
def programs_of_this_file():
    compile_step = functools.cache(step.compile_step)
    plain = {"fit": "", "fit_keeps": ()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compile_step", lambda config: compile_step(changed(config, compute=plain)))
        yield


def total(config: Config) -> int:
    return memory_plan.make(config, step.compile_step(config), Capacity(None, "")).total


def test_the_choice_is_the_program_that_runs():
    """The plan's total is that of the compiled program, to the byte, and within what there is."""
    room = total(changed(CONFIG, training=options.split(CONFIG, 16)))
    found = fit.prepare(CONFIG, Capacity(room, "--compute.fit"))
    memory: Any = found.program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    assert found.plan.total == memory.argument_size_in_bytes + memory.temp_size_in_bytes + new <= room
    assert found.config.training.batch_size * found.config.training.micro_batches == 48
    assert found.lines[0].startswith("fit       the fastest that fits in ")
    assert sum(line.endswith("compiled, fits") for line in found.lines) == 1
    assert found.lines[-1].endswith("free to choose: micro_batches, recompute, classifier_chunk")


def test_what_fits_nowhere_is_refused_with_what_would_help():
    config = kept("compute.recompute", "compute.classifier_chunk", "training.micro_batches")
    needs = total(config)
    least, has = f"{needs / 1e6:.1f} MB", f"{(needs - 1) / 1e6:.1f} MB"
    with pytest.raises(UserError) as refused:
        fit.prepare(config, Capacity(needs - 1, "97% of --compute.fit"))
    message = str(refused.value)
    assert message.startswith(
        f"--compute.fit 1GB: the least that this run needs on a device is {least}, with 3 x 16 sequences, "
        f"recompute norms, chunk 256; {has} is 97% of --compute.fit. Free to choose: nothing; kept "
        "as given: compute.recompute = norms, compute.classifier_chunk = 256, training.micro_batches = 3."
    )
    helps = [line.split("  ")[1] for line in message.splitlines()[1:]]
    assert "leaving those away that are kept" in helps
    assert "--compute.dtype bfloat16" in helps
    assert any(words.startswith("--training.sequence-length 16") for words in helps)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_capacity(monkeypatch, platform):
    """It is what is granted, at most what the device has; less a margin, and on a CPU what the process takes."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(fit.device_memory, "capacity", lambda *_: Capacity(2 * 10**9, "what there is"))
    there = 2 * 10**9 - (fit.OF_A_CPU if platform == "cpu" else 0)
    assert fit.capacity(CONFIG) == Capacity(970_000_000, "97% of --compute.fit")
    for size in ("5GB", "device"):
        config = changed(CONFIG, compute={"fit": size})
        assert fit.capacity(config) == Capacity(int(0.97 * there), "97% of what there is")
    assert fit.capacity(changed(CONFIG, compute={"fit": ""})).bytes == 2 * 10**9


def test_moments_are_counted_as_the_state_has_them(monkeypatch):
    """Their bytes follow from the state's shapes, for an optimizer with one moment or with others."""
    one = memory_plan.measure(CONFIG, 1)
    sizes = memory_plan.measure(changed(CONFIG, parallel={"zero": 1}), 4)
    assert one.moments == 2 * one.parameters
    assert sizes.parameters == pytest.approx(one.parameters / 4, rel=0.01)
    memory_plan._of_parameters.cache_clear()
    whole = memory_plan.state_of
    monkeypatch.setattr(
        memory_plan, "state_of", lambda params, config: (state := whole(params, config))._replace(moments=state.params)
    )
    assert memory_plan.measure(CONFIG, 1).moments == one.parameters
    memory_plan._of_parameters.cache_clear()


@pytest.mark.slow
def test_several_devices_may_shard():
    """A run that doesn't fit at stage 0 is sharded, on simulated devices with a real program."""
    config = kept("training.micro_batches", "compute.recompute", "compute.classifier_chunk")
    config = dataclasses.replace(config, parallel=Parallel(devices=2))
    room = total(changed(config, parallel={"zero": 1}))
    found = fit.prepare(config, Capacity(room, "--compute.fit"))
    assert found.config.parallel.zero >= 1
    assert found.plan.total <= room
