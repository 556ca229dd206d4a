"""Checks of options: each raises a UserError that names the option and says what its value must be.

Options of a part of the program that depend on each other are checked by that part, such as `fit.check`.
"""

import math
import re
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options.config import IN_DATA, SPIKE_WINDOW, Config, Lora, Model, Objective, Parallel, Sampling
from jaxgpt.options.settings import option

LARGEST = 2**31 - 1  # steps, seeds and sizes become int32 on the device
MOST_HISTORY = 4096  # steps of compute.fp8_history; all of it is moved in each, and is on every device
MOST_PROCESSES = 1 << 16
MOST_RANK = 1 << 16


def check(config: Config) -> None:
    """Raises a UserError, naming the option, for a value that no run could use."""
    check_model(config.model)
    positive = {
        "compute": ("classifier_chunk", "attention_block", "fp8_history"),
        "training": ("steps", "batch_size", "micro_batches", "stop_after_nonfinite"),
        "rollouts": ("answers", "tokens", "minibatches", "epochs"),
        "evaluation": ("batch_size",),
        "optimizer": ("learning_rate", "epsilon"),
        "checkpoint": ("keep_last",),
    }
    not_negative = {
        "parallel": ("devices", "processes"),
        "compute": ("memory_limit_gib", "fp8_error_every"),
        "data": ("skip_bad",),
        "training": ("sequence_length", "seed", "evaluate_every", "evaluation_batches", "patience"),
        "evaluation": ("every", "limit"),
        "optimizer": ("muon_learning_rate", "warmup_steps", "final_fraction", "weight_decay", "clip_norm"),
        "checkpoint": ("every_steps", "every_minutes", "keep_every", "stop_minutes_before_end"),
        "run": ("sample_every",),
    }
    for sections in (positive, not_negative):
        for section, keys in sections.items():
            for key in keys:
                check_number(getattr(getattr(config, section), key), section, key, positive=sections is positive)
    context, largest, run = config.model.context, math.sqrt(SPIKE_WINDOW - 1), config.run
    of_length = f"at most the model's context, {context} (--model.context)"
    of_spikes = f"at least 0, and below {largest:.2f} to skip any step"
    for section, keys, holds, needed in (
        ("training", ("sequence_length",), lambda tokens: tokens <= context, of_length),
        ("data", ("validation_fraction",), lambda share: 0 < share < 1, "between 0 and 1"),
        ("optimizer", ("beta1", "beta2", "momentum"), lambda decay: 0 <= decay < 1, "at least 0 and below 1"),
        ("training", ("loss_spike_z", "grad_norm_spike_z"), lambda z: 0 <= z < largest, of_spikes),
        ("optimizer", ("final_fraction",), lambda share: share <= 1, "at most 1"),
    ):
        for key in keys:
            value = getattr(getattr(config, section), key)
            _require(holds(value), section, key, value, needed)
    check_sampling(config.sampling, "sampling")
    check_lora(config.lora)
    check_objective(config.objective)
    needed = "adamw where adapters are trained, which are factors of a matrix (--lora.rank)"
    _require(config.optimizer.name == "adamw" or not config.lora.rank, "optimizer", "name", "muon", needed)
    needed = "empty for a reward model, which draws and scores no text (--objective.name)"
    tasks = config.evaluation.tasks
    _require(not (tasks and config.objective.name == "reward"), "evaluation", "tasks", tasks, needed)
    needed = "given, since adapters are trained beside weights that there are (--lora.rank)"
    _require(bool(config.training.init_from) or not config.lora.rank, "training", "init_from", "empty", needed)
    check_processes(config.parallel)
    _check_products(config)
    needed = "left away with --resume, or else the run would be lost before it is resumed"
    _require(not (run.overwrite and run.resume == "always"), "run", "overwrite", True, needed)


def check_model(model: Model) -> None:
    """Raises a UserError, naming the option, for a shape that no model has."""
    for key in ("layers", "heads", "width", "context"):
        check_number(getattr(model, key), "model", key, positive=True)
    check_number(model.vocabulary_size, "model", "vocabulary_size")
    if not model.head_width:
        needed = f"divisible by the number of heads, {model.heads} (--model.heads)"
        _require(model.width % model.heads == 0, "model", "width", model.width, needed)
    for key in ("kv_heads", "head_width", "feed_forward", "window", "logit_soft_cap", "experts", "router_balance"):
        check_number(getattr(model, key), "model", key)
    for key in ("norm_epsilon", "rope_base", "rope_factor", "rope_low_frequency", "rope_original_context"):
        check_number(getattr(model, key), "model", key, positive=True)
    check_number(model.experts_per_token, "model", "experts_per_token", positive=True)
    check_number(model.router_z, "model", "router_z")
    _require(0 <= model.dropout < 1, "model", "dropout", model.dropout, "at least 0 and below 1")
    needed = f"a divisor of the number of heads, {model.heads} (--model.heads)"
    _require(model.heads % model.key_value_heads == 0, "model", "kv_heads", model.kv_heads, needed)
    low, needed = model.rope_low_frequency, f"above --model.rope-low-frequency, {model.rope_low_frequency}"
    _require(
        low < model.rope_high_frequency < math.inf, "model", "rope_high_frequency", model.rope_high_frequency, needed
    )
    start, needed = model.document_start, f"a token, -1 for none or -2 for where the data say, and at most {LARGEST}"
    _require(IN_DATA <= start <= LARGEST, "model", "document_start", start, needed)


def check_objective(objective: Objective) -> None:
    """Raises a UserError, naming the option, for a value that no objective can have."""
    for key in ("beta", "clip", "program_seconds", "program_memory_mib"):
        check_number(getattr(objective, key), "objective", key, positive=True)
    for key in ("centre", "margin", "clip_above", "value_clip"):
        check_number(getattr(objective, key), "objective", key)
    for key in ("kl_coefficient", "entropy_coefficient", "value_coefficient", "kl_penalty", "kl_target"):
        check_number(getattr(objective, key), "objective", key)
    for key, holds, needed in (
        ("completions", lambda number: number >= 2, "at least 2"),
        ("label_smoothing", lambda share: 0 <= share < 0.5, "at least 0 and below 0.5"),
        ("discount", lambda factor: 0 <= factor <= 1, "at least 0 and at most 1"),
        ("advantage_decay", lambda factor: 0 <= factor <= 1, "at least 0 and at most 1"),
    ):
        value = getattr(objective, key)
        _require(holds(value), "objective", key, value, needed)


def check_lora(lora: Lora) -> None:
    """Raises a UserError, naming the option, for a value that no adapters can have."""
    check_number(lora.rank, "lora", "rank")
    _require(lora.rank <= MOST_RANK, "lora", "rank", lora.rank, f"at most {MOST_RANK}")
    check_number(lora.alpha, "lora", "alpha", positive=True)
    needed = "left away where --lora.base is not int8 or nf4, which alone have scales"
    _require(not lora.double_quantization or lora.base in ("int8", "nf4"), "lora", "double_quantization", True, needed)


def check_processes(parallel: Parallel) -> None:
    """Raises a UserError where a process can't know which one it is, or where the others are."""
    processes, process, coordinator = parallel.processes, parallel.process, parallel.coordinator
    _require(processes <= MOST_PROCESSES, "parallel", "processes", processes, f"at most {MOST_PROCESSES}")
    if processes > 1:
        needed = f"from 0 to {processes - 1}, another in each of the {processes} processes (--parallel.processes)"
        _require(0 <= process < processes, "parallel", "process", process, needed)
    else:
        needed = "left away where --parallel.processes is not given, or 1"
        _require(process == -1, "parallel", "process", process, needed)
    needed = "host:port, such as node1:12345, the same in all processes"
    _require(
        is_address(coordinator) or (not coordinator and processes <= 1),
        "parallel",
        "coordinator",
        coordinator or "empty",
        needed,
    )


def is_address(text: str) -> bool:
    """Returns whether a text is host:port."""
    host, _, port = text.rpartition(":")
    return bool(host) and re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 2**16


def check_sampling(sampling: Sampling, section: str) -> None:
    """Raises a UserError, naming the option, for a value that nothing can be drawn with."""
    for key in ("tokens", "temperature", "top_k"):
        check_number(getattr(sampling, key), section, key)
    _require(0 < sampling.top_p <= 1, section, "top_p", sampling.top_p, "above 0 and at most 1")
    _require(0 <= sampling.min_p <= 1, section, "min_p", sampling.min_p, "at least 0 and at most 1")
    check_number(sampling.repetition_penalty, section, "repetition_penalty", positive=True)
    _require(all(sampling.stop), section, "stop", "an empty text", "text of at least one character")


def _check_products(config: Config) -> None:
    """Raises a UserError, naming the option, where products of 8 bits can't be had."""
    if (history := config.compute.fp8_history) > MOST_HISTORY:
        raise UserError(f"--compute.fp8-history is {history}, and must be at most {MOST_HISTORY}")
    if config.compute.products != "fp8":
        return
    for name, value, works, needed in (
        ("--model.experts", config.model.experts, not config.model.experts, "0, since experts have"),
        ("--lora.rank", config.lora.rank, not config.lora.rank, "0, since weights beside adapters have"),
        ("--parallel.reproducible", True, not config.parallel.reproducible, "left away, since its sums have"),
        (
            "--objective.name",
            config.objective.name,
            _has_head(config),
            "next_token for --compute.fp8-head: others have",
        ),
    ):
        if not works:
            raise UserError(f"{name} is {value}; with --compute.products fp8 it must be {needed} no products of 8 bits")


def _has_head(config: Config) -> bool:
    return config.objective.name == "next_token" or not config.compute.fp8_head


def check_own(options: Any, positive: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
    """Checks numbers among the options of a command's own, as `check_number` does."""
    for key in (*positive, *not_negative):
        check_number(getattr(options, key), "", key, positive=key in positive)


def check_number(value: float, section: str, key: str, *, positive: bool = False) -> None:
    """Raises a UserError, naming the option, for a number that is out of its bounds.

    They are 0 (included unless `positive`) and, for an int, `LARGEST`. NaN and infinity are out of bounds.
    """
    bound = "greater than 0" if positive else "0 or more"
    _require(value > 0 or (value == 0 and not positive), section, key, value, bound)
    _require(math.isfinite(value), section, key, value, "finite")
    _require(isinstance(value, float) or value <= LARGEST, section, key, value, f"at most {LARGEST}")


def _require(holds: bool, section: str, key: str, value: object, requirement: str) -> None:
    if not holds:  # NaN fails every comparison, and so ends here too
        raise UserError(f"{option(section, key)} is {shown(value)}, and must be {requirement}")
