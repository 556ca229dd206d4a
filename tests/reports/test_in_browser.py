"""The report in headless Chromium: what a person would see, what the console says, and what the network would."""

import json
import threading

import pytest

from jaxgpt.commands import cli
from jaxgpt.reports import live_report
from jaxgpt.runs import verdict
from tests.reports import browser as browsers
from tests.reports import runs

PROGRAM = browsers.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium here (Debian: apt install chromium)")

TITLES = """[...document.querySelectorAll('#curves h2')].map((heading) => heading.textContent)"""
TRACES = """Object.fromEntries([...document.querySelectorAll('.plot')].map((plot) =>
    [plot.parentElement.id, plot.data.map((trace) => [trace.name, trace.x.length, [...trace.y].slice(-1)[0]])]))"""
WORDS = """[...document.querySelectorAll('.plot .annotation-text')].map((words) => words.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM
    with browsers.Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run's page, and one of two runs of which the first is hostile, by `run.py report`."""
    folder = tmp_path_factory.mktemp("runs")
    good = runs.write(folder / "good")
    bad = runs.write(folder / "<img src=x>", note=runs.HOSTILE, sample=runs.HOSTILE, text="mine.txt", speed=0.9)
    for run, word in ((good, "random"), (bad, runs.HOSTILE)):
        write_verdict(run, word)
    both = folder / "both.html"
    assert cli.main(["report", str(good)]) == 0
    assert cli.main(["report", str(bad), str(good), "--output", str(both)]) == 0
    return {"one": good / "report.html", "both": both}


def write_verdict(run, word):
    """Writes `gradcheck --as-run`'s verdict on a right and a wrong tensor, with the word wherever one may stand."""
    right = verdict.Tensor(word, 1e-7, 2e-7, 1e-5, word, "", True)
    wrong = right._replace(tensor="head.weight", error=float("nan"), fault=word, passed=False)
    about = dict.fromkeys(("step", "device", "driver", "compared"), word) | {"versions": {word: word}}
    (run / verdict.NAME).write_text(json.dumps(verdict.as_json([right, wrong], about)))


def quiet(browser):
    """Asserts that the page has reported nothing to its console, and has asked no other host."""
    assert browser.complaints() == []
    assert browser.requests() == []


def test_every_curve_is_there_with_its_points(browser, pages):
    browser.open(pages["one"].as_uri())
    assert browser.ask(TITLES) == [
        "Loss, nats per token", "hellaswag, accuracy in %", "Gradient norm", "Learning rate", "Tokens per second",
        "MFU, % of the device's peak", "Waiting for data, % of the step",
    ]  # fmt: skip
    traces = browser.ask(TRACES)
    assert [(name, points) for name, points, _ in traces["card-loss"]] == [
        ("train, each step", 399), ("train, smoothed", 399), ("validation", 9)
    ]  # fmt: skip
    assert traces["card-task-hellaswag"] == [["good", 9, pytest.approx(29)]]
    assert traces["card-norm"][1] == ["skipped", 2, 25]
    assert traces["card-rate"] == [["good", 400, pytest.approx(6e-4)]]
    assert browser.ask("document.querySelectorAll('.plot .scatterlayer .trace').length") == 10  # and they are drawn
    quiet(browser)


def test_published_results_are_lines_where_the_text_is_finewebs(browser, pages):
    browser.open(pages["one"].as_uri())
    assert browser.ask(WORDS) == ["GPT-2 124M: 3.425", "GPT-2 124M: 29.45", "GPT-3 125M: 33.7"]
    assert browser.ask("document.querySelectorAll('.plot .shapelayer path').length") == 3


def test_the_rest_of_the_page(browser, pages):
    browser.open(pages["one"].as_uri())
    words = browser.ask("document.getElementById('runs').innerText")
    assert "400 of 500" in words
    assert "2 min" in words  # 100 steps of 1.14 s
    assert "not finished" in words
    memory = browser.ask("document.querySelector('.parts').innerText.split('\\n')")
    assert memory[:2] == ["masters (float32)", "500 MiB"]
    share = browser.ask("document.querySelector('.bar div').getBoundingClientRect().width / "
                        "document.querySelector('.bar').getBoundingClientRect().width")  # fmt: skip
    assert share == pytest.approx(500 / (24 * 1024), rel=0.05)
    configuration = browser.ask("document.getElementById('configuration').textContent")
    for part in ("training.steps500", "optimizer.learning_rate", "NVIDIA H100", "jax0.10.2"):
        assert part in configuration


def test_the_verdict_on_gradients(browser, pages):
    """Wrong tensors stand out, and come first."""
    browser.open(pages["one"].as_uri())
    card = "[...document.querySelectorAll('#details .card')].find((card) => card.textContent.startsWith('Gradients'))"
    assert browser.ask(f"{card}.querySelector('.bad').textContent") == "1 of 2 are wrong."
    assert browser.ask(
        f"[...{card}.querySelectorAll('tbody tr')].map((row) => [...row.children].map((cell) => cell.textContent))"
    ) == [
        ["head.weight", "not finite", "2.0e-7", "1.0e-5", "random: random"],
        ["random", "1.0e-7", "2.0e-7", "1.0e-5", "random"],
    ]
    quiet(browser)


def test_samples_over_time(browser, pages):
    browser.open(pages["one"].as_uri())
    assert browser.ask("document.querySelector('.sample').textContent").endswith("after 400")
    browser.ask("(slider => { slider.value = 2; slider.dispatchEvent(new Event('input')); })"
                "(document.querySelector('.picker input'))")  # fmt: skip
    assert browser.ask("document.querySelector('.sample').textContent").endswith("after 100")


def test_what_a_run_wrote_stays_text(browser, pages):
    browser.open(pages["both"].as_uri())
    assert browser.ask("document.querySelector('.sample').textContent") == f"{runs.HOSTILE}\nafter 400"
    assert browser.ask("document.querySelector('.note').textContent") == runs.HOSTILE
    assert browser.ask("document.querySelectorAll('img').length") == 0
    assert browser.ask("document.querySelectorAll('#details script, #runs script, #runs b b').length") == 0
    assert browser.ask("document.title") == "<img src=x>, good"
    assert browser.ask("document.querySelector('.legendtext').textContent") == "<img src=x>, train"
    quiet(browser)


def test_runs_laid_over_each_other_and_what_differs(browser, pages):
    browser.open(pages["both"].as_uri())
    traces = browser.ask(TRACES)
    assert len(traces["card-loss"]) == 4
    assert [name for name, *_ in traces["card-rate"]] == ["&lt;img src=x&gt;", "good"]  # as plotly escapes
    differs = "[...document.querySelectorAll('tr.differs th')].map((name) => name.textContent)"
    assert browser.ask(differs) == ["data.text", "run.name", "run.note"]


def test_by_tokens_and_zooming_into_all(browser, pages):
    browser.open(pages["one"].as_uri())
    browser.ask("(axis => { axis.value = 'tokens'; axis.dispatchEvent(new Event('change')); })"
                "(document.getElementById('axis'))")  # fmt: skip
    last = "[...document.querySelector('#card-rate .plot').data[0].x].slice(-1)[0]"
    assert browser.ask(last) == 400 * 524288
    browser.ask("Plotly.relayout(document.querySelector('#card-loss .plot'), "
                "{'xaxis.range[0]': 1e7, 'xaxis.range[1]': 5e7}).then(() => 1)")  # fmt: skip
    browser.wait("document.querySelector('#card-rate .plot').layout.xaxis.range[1] === 5e7")
    quiet(browser)


@pytest.mark.parametrize(("width", "dark"), [(360, True), (360, False), (1600, True)])
def test_no_width_needs_scrolling_sideways_and_dark_is_dark(browser, pages, width, dark):
    browser.open(pages["both"].as_uri(), width=width, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    red = int(browser.ask("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    ink = browser.ask("getComputedStyle(document.querySelector('.plot .legendtext')).fill")
    assert (red < 60) == dark
    assert (int(ink.split("(")[1].split(",")[0]) > 180) == dark
    quiet(browser)


def test_without_plotly_the_page_says_so(browser, tmp_path, monkeypatch):
    from jaxgpt.reports import page

    monkeypatch.setattr(page, "plotly", lambda: b"")
    folder = runs.write(tmp_path / "plain")
    assert cli.main(["report", str(folder)]) == 0
    browser.open((folder / "report.html").as_uri())
    assert "pip install plotly" in browser.ask("document.getElementById('curves').textContent")
    assert "400 of 500" in browser.ask("document.getElementById('runs').innerText")
    quiet(browser)


def test_live_it_updates_by_itself(browser, tmp_path):
    folder = runs.write(tmp_path / "live", steps=50)
    server = live_report.listen([folder], 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        browser.open(server.url)
        assert browser.ask(TRACES)["card-rate"][0][1] == 50
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 51, "loss": 2.5, "learning_rate": 1e-3, "skipped": 2}) + "\n")
        browser.wait("document.querySelector('#card-rate .plot').data[0].x.length === 51")
        assert browser.complaints() == []
        assert {url.split("?")[0] for url in browser.requests()} == {server.url, f"{server.url}data.json"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
