"""A run's report: its content, from the files of its folder, and one HTML file that asks the network for nothing.

The curves are drawn by plotly.js, which comes with the Python package plotly (MIT); only that file of it is used, so
nothing of plotly is imported and a page costs no more than writing it. The choice on PyPI:

    plotly    4.8 MB of script, 2.0 MB compressed as here; figures are plain JSON, so that live updates and dark mode
              are a call each; hover across curves, zoom, touch; 10 MB to download, and one small package that it needs
    bokeh     1.3 MB, 0.5 MB compressed; figures are objects built by its Python classes, which would take the training
              process's time, and their colours are fixed where they are made; needs tornado, Jinja2 and four more
    altair    its Python package has no script in it: a page would load it from the network

Size decided less than time. The script is kept compressed in the page (base64 of gzip, which every browser since 2023
unpacks), so that a report is about 2.3 MB. plotly is one of the package's own dependencies since a report is written
for every run; where it is missing all the same, the page is written without curves and says so.

All that comes from a run goes into the page as JSON in which no character can end the script element it is in, and
onto the screen as text, never as HTML. A Content-Security-Policy forbids the page any request, so that a mistake here
would not reach the network either.
"""

import base64
import functools
import gzip
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.reports.history import FURTHER, LOSSES, Curve, History, number, smoothed, thinned
from jaxgpt.runs import verdict

MACHINE = "machine.json"
SAMPLES = 40  # shown, evenly over the run
SAMPLE_CHARACTERS = 4000  # of each sample
SAMPLES_BYTES = 4 * 2**20  # of samples.txt that are read, from its end
SKIPS = 500  # marks at skipped steps
HERE = Path(__file__).parent
SCRIPT = "package_data/plotly.min.js"  # in plotly's package
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "

# Published results by millions of parameters, as llm.c compares with them: FineWeb's validation loss and HellaSwag's
# accuracy, normalised by length. GPT-2's are what OpenAI's weights reach. GPT-3's are from its paper: its weights were
# never published, so there is no loss on FineWeb.
GPT2 = {
    124: {"loss": 3.424958, "hellaswag": 0.294463},
    350: {"loss": 3.083089, "hellaswag": 0.375224},
    774: {"loss": 3.000580, "hellaswag": 0.431986},
    1558: {"loss": 2.831273, "hellaswag": 0.488946},
}
GPT3_HELLASWAG = {125: 0.337, 350: 0.436, 760: 0.510, 1300: 0.547}


def of_run(folder: Path, history: History, state: str = "") -> dict[str, Any]:
    """Returns all that a page shows of a run. UserError for a file of its folder that is damaged.

    The metrics are shown as far as they are read. Words for the run's `state` are made of the number of steps if empty.
    """
    config = _toml(folder / "config.toml")
    versions = config.pop("versions", {})
    machine = _json(folder / MACHINE)
    step = history.steps[-1] if len(history.steps) else max(history.validation, default=0)
    steps = _get(config, "training", "steps", 0)
    left = (steps - step) * history.recent("step_seconds") if steps > step else 0.0
    return {
        "name": str(_get(config, "run", "name", "") or folder.resolve().name),
        "note": str(_get(config, "run", "note", "")),
        "step": step,
        "steps": steps,
        "state": state or ("finished" if steps and step >= steps else "not finished"),
        "written": time.time(),
        "changed": history.path.lstat().st_mtime,
        "seconds_left": _plain(left),
        "tokens_per_step": history.tokens_per_step,
        "now": {name: _plain(history.recent(name)) for name in ("loss", "tokens_per_second", "mfu", "step_seconds")},
        "skips": len(history.skipped),
        "curves": _curves(history),
        "loss_unit": LOSSES.get(_get(config, "objective", "name", "next_token"), ""),
        "further": {
            title: [
                _points(thinned(train := history.further_curve(name))),
                _points(smoothed(train)),
                _points(history.further_curve(f"val_{name}")),
            ]
            for name, title in FURTHER.items()
            if name in history.further or f"val_{name}" in history.further
        },
        "tasks": {
            name: _points(_arrays((step, 100 * accuracy) for step, accuracy in sorted(scores.items())))
            for name, scores in history.tasks.items()
        },
        "baselines": _baselines(config, machine, history),
        "plan": _plan(_json(folder / "memory_plan.json")),
        "gradcheck": verdict.read(folder),
        "samples": _samples(folder / "samples.txt"),
        "config": {section: table for section, table in config.items() if isinstance(table, dict)},
        "versions": versions,
        "machine": machine,
    }


def _curves(history: History) -> dict[str, Any]:
    loss = history.curve("loss")
    steps, wait = history.curve("data_wait_seconds")
    seconds = np.array(history.columns["step_seconds"])[np.isfinite(np.array(history.columns["data_wait_seconds"]))]
    share = 100 * wait / np.where(seconds > 0, seconds, np.inf)
    share = np.where(np.isfinite(share), share, 0.0)
    curves = {
        "loss": thinned(loss),
        "loss_smoothed": smoothed(loss),
        "validation": _arrays(history.validation.items()),
        "skipped": _arrays(history.skipped[:: max(1, len(history.skipped) // SKIPS)]),
        "data_wait": thinned((steps, share)),
    }
    for name in ("learning_rate", "grad_norm"):
        curves[name] = thinned(history.curve(name))
    for name, scale in (("tokens_per_second", 1), ("mfu", 100)):  # without the first step, in which all is compiled
        steps, values = history.curve(name)
        curves[name] = thinned((steps[1:], scale * values[1:]))
    return {name: _points(curve) for name, curve in curves.items()}


def _arrays(points: Iterable[tuple[int, float]]) -> Curve:
    pairs = list(points)
    return np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64)


def _points(curve: Curve) -> list[list[Any]]:
    steps, values = curve
    return [[int(step) for step in steps], [_plain(float(value)) for value in values]]


def _plain(value: float) -> float | None:
    """Returns a number with six digits, more than a picture shows; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _baselines(config: dict[str, Any], machine: dict[str, Any], history: History) -> list[dict[str, Any]]:
    """Returns lines at the results of the published models nearest in size.

    The loss has one where the text is FineWeb's, and the accuracy where the task is HellaSwag.
    """
    millions = number(machine.get("parameters"), 124e6) / 1e6
    text = f"{_get(config, 'data', 'text', '')} {_get(config, 'data', 'mixture', '')}".lower()
    # FineWeb-Edu has a validation split of its own, and a loss counts another tokenizer's tokens.
    fineweb = "fineweb" in text and "edu" not in text and _get(config, "data", "tokenizer", "gpt2") == "gpt2"
    far = lambda size: abs(math.log(size / max(millions, 1e-6)))  # noqa: E731
    gpt2, gpt3 = min(GPT2, key=far), min(GPT3_HELLASWAG, key=far)
    found = []
    if fineweb:
        found.append({"of": "loss", "name": f"GPT-2 {gpt2}M", "value": GPT2[gpt2]["loss"]})
    for task in (name for name in history.tasks if name.startswith("hellaswag")):
        found.append({"of": task, "name": f"GPT-2 {gpt2}M", "value": 100 * GPT2[gpt2]["hellaswag"]})
        found.append({"of": task, "name": f"GPT-3 {gpt3}M", "value": 100 * GPT3_HELLASWAG[gpt3]})
    return found


def _samples(path: Path) -> list[dict[str, Any]]:
    """Returns the texts of a samples.txt by step. What a text says, even lines like the file's own, stays text."""
    if not os.path.lexists(path):
        return []
    with files.open_file(path, within=path.parent) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLES_BYTES))
        written = file.read(SAMPLES_BYTES).decode("utf-8", "replace")
    parts = re.split(r"^--- step (\d{1,18})\n", written, flags=re.MULTILINE)[1:]
    found = [
        {"step": int(step), "text": text.strip("\n")[:SAMPLE_CHARACTERS]}
        for step, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    shown = min(SAMPLES, len(found))
    return [found[round(index * (len(found) - 1) / max(1, shown - 1))] for index in range(shown)]


def _get(config: dict[str, Any], section: str, key: str, otherwise: Any) -> Any:
    table = config.get(section)
    value = table.get(key, otherwise) if isinstance(table, dict) else otherwise
    return value if isinstance(value, type(otherwise)) else otherwise


def _toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a config.toml. Any version may have written it: an unknown option is no mistake here."""
    if not os.path.lexists(path):
        raise UserError(f"{shown(path)}: there is no such file, so {shown(path.parent)} is not a run's folder")
    return {name: _without_infinity(table) for name, table in files.read_toml(path, within=path.parent).items()}


def _json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one where the file is missing, as in an older run's folder."""
    if not os.path.lexists(path):
        return {}
    try:
        return {name: _without_infinity(value) for name, value in files.read_json(path, within=path.parent).items()}
    except UserError as error:
        raise UserError(f"{error}. Without the file the report leaves it out") from None


def _without_infinity(value: Any) -> Any:
    """Returns the value with NaN and infinity as text, since the page's JSON hasn't got them."""
    if isinstance(value, dict):
        return {name: _without_infinity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plan(found: dict[str, Any]) -> dict[str, Any]:
    """Returns a memory plan whose sizes are numbers, since the page calculates with them; else an empty one."""
    parts = found.get("parts")
    if not isinstance(parts, dict):
        return {}
    return {
        "parts": {name: size for name, size in parts.items() if math.isfinite(number(size))},
        "total": number(found.get("total"), 0.0),
        "capacity": number(found.get("capacity"), 0.0),
        **{name: str(found.get(name, "")) for name in ("source", "recompute")},
    }


def render(runs: list[dict[str, Any]], *, live: bool = False) -> bytes:
    """Returns the page of some runs, of each what `of_run` returns; `live` asks its server for news."""
    before, between, after = _parts(live)
    data = json.dumps({"runs": runs, "live": live}, allow_nan=False, default=str)
    return before + safe(data).encode() + between + plotly() + after


def safe(data: str) -> str:
    """Returns JSON that may stand in a script element: the same values, without characters that HTML knows."""
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


@functools.cache
def _parts(live: bool) -> tuple[bytes, bytes, bytes]:
    """Returns the page before the data, between data and script, and after the script."""
    policy = POLICY + ("connect-src 'self'" if live else "connect-src 'none'")
    page = (HERE / "page.html").read_text(encoding="utf-8").replace("{policy}", policy)
    for name in ("page.css", "memory.js", "curves.js", "page.js"):
        page = page.replace(f"{{{name}}}", (HERE / name).read_text(encoding="utf-8"))
    before, rest = page.split("{data}")
    between, after = rest.split("{plotly}")
    return before.encode(), between.encode(), after.encode()


@functools.cache
def plotly() -> bytes:
    """Returns plotly.js as base64 of gzip; empty where plotly isn't installed."""
    found = importlib.util.find_spec("plotly")
    if not (found and found.origin):
        return b""
    script = Path(found.origin).parent / SCRIPT
    return base64.b64encode(gzip.compress(script.read_bytes(), 6, mtime=0)) if script.is_file() else b""
