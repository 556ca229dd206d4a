"""The page to talk to the model, in headless Chromium, with a server of a random model behind it."""

import contextlib
import dataclasses
import json
import re
import urllib.request

import jax
import pytest

from jaxgpt.generation import page
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.worker import Worker
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute
from tests.generation.servers import BYTES, KEY, NAME, listening
from tests.generation.test_chat_server import MODEL, SERVED
from tests.reports import browser as browsers

PROGRAM = browsers.find()
in_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium here (Debian: apt install chromium)")

HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
SAID = "[...document.querySelectorAll('.said')].map((said) => said.textContent)"
IDLE = "document.body.dataset.busy === 'no'"


def drawing(seed: int) -> Worker:
    """Returns a worker that draws texts from a random model."""
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(seed)))
    token = params.embedding.token.at[128:].multiply(0.1)
    params = params._replace(embedding=params.embedding._replace(token=token))
    return Worker(ContinuousBatch(Decoder(params, MODEL, Compute(), slots=4, capacity=MODEL.context), BYTES))


@contextlib.contextmanager
def serving(*beside: str, **options):
    """The address of a server of a model, and of others with these names beside it."""
    models = [(drawing(0), SERVED), *((drawing(n), dataclasses.replace(SERVED, name=name)) for n, name in
                                      enumerate(beside, start=1))]  # fmt: skip
    with listening(models[0][0], served=SERVED, beside=models[1:], **options) as address:
        yield address
    for worker, _ in models:
        worker.stop()


@pytest.fixture(scope="module")
def address():
    with serving(key="", waiting=32) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM
    with browsers.Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def setting(browser, **values):
    for name, value in values.items():
        browser.ask(f"(field => {{ field.value = {json.dumps(value)}; "
                    f"field.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))")  # fmt: skip


def press(browser, key: str, code: int):
    for kind in ("keyDown", "keyUp"):
        text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


def send(browser, text: str):
    browser.ask("document.getElementById('text').focus()")
    browser.call("Input.insertText", text=text)
    press(browser, "Enter", 13)
    browser.wait(f"document.body.dataset.busy && {IDLE}")


@pytest.fixture
def opened(browser, address):
    browser.open(address)
    setting(browser, max_completion_tokens="12", seed="3")
    return browser


def click(browser, words: str, number: int = 0):
    browser.ask(f"[...document.querySelectorAll('button')].filter((one) => one.textContent === {json.dumps(words)})"
                f"[{number}].click()")  # fmt: skip


def test_it_names_no_other_address_and_its_policy_allows_none(address):
    text = page.content().decode()
    assert not re.search(r"https?:|//[a-z]|url\(|innerHTML|outerHTML|insertAdjacent|eval\(|document\.write", text)
    with urllib.request.urlopen(address) as answer:
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert answer.read() == page.content()
        assert answer.headers["Content-Type"].startswith("text/html")
    assert "unsafe" not in str(policy)
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


@in_browser
def test_an_answer_comes_and_the_conversation_goes_on(opened):
    send(opened, "Hello")
    mine, theirs = opened.ask(SAID)
    assert mine == "Hello"
    assert len(theirs) > 3
    send(opened, "And?")
    assert opened.ask(SAID)[:3] == [mine, theirs, "And?"]
    assert len(opened.ask(SAID)) == 4
    assert opened.complaints() == []
    assert opened.ask("document.title") == NAME
    assert not opened.ask("document.getElementById('key-label').offsetParent")
    assert not opened.ask("document.getElementById('models').offsetParent")


@in_browser
def test_regenerating_with_the_same_seed_is_the_same_and_editing_is_another(opened):
    send(opened, "Hello")
    first = opened.ask(SAID)
    click(opened, "Regenerate")
    opened.wait(IDLE)
    assert opened.ask(SAID) == first
    setting(opened, seed="4")
    click(opened, "Regenerate")
    opened.wait(IDLE)
    assert opened.ask(SAID)[1] != first[1]
    click(opened, "Edit")
    opened.ask("document.querySelector('.mine textarea').value = 'Good bye'")
    click(opened, "Send again")
    opened.wait(IDLE)
    said = opened.ask(SAID)
    assert (len(said), said[0]) == (2, "Good bye")


@in_browser
def test_the_system_prompt_and_settings_are_sent(opened):
    setting(opened, temperature="0")
    send(opened, "Hello")
    plain = opened.ask(SAID)[1]
    setting(opened, system="Be brief, and speak of the sea.")
    click(opened, "Regenerate")
    opened.wait(IDLE)
    assert opened.ask(SAID)[1] != plain


@in_browser
def test_runs_side_by_side_and_one_is_chosen(opened):
    setting(opened, runs="3", temperature="1.5")
    send(opened, "Hello")
    answers = opened.ask(SAID)[1:]
    assert len(set(answers)) == 3
    click(opened, "Go on with this", 2)
    assert opened.ask("document.querySelector('.chosen .said').textContent") == answers[2]
    assert opened.ask("[...document.querySelectorAll('[aria-pressed]')].map((one) => one.ariaPressed)") == [
        "false", "false", "true"
    ]  # fmt: skip
    left = opened.ask("[...document.querySelectorAll('.run')].map((run) => run.getBoundingClientRect().left)")
    assert left == sorted(set(left))


@in_browser
def test_several_models_answer_side_by_side(browser):
    name = "sft <b>"
    with serving(name, key="", waiting=32) as address:
        browser.open(address)
        assert browser.ask("document.title") == f"{NAME}, {name}"
        setting(browser, max_completion_tokens="12", seed="3", runs="2")
        send(browser, "Hello")
        answers = browser.ask(SAID)[1:]
        shown = browser.ask("[...document.querySelectorAll('.run h3')].map((one) => one.textContent)")
        assert shown == [NAME, NAME, name, name]
        assert len(set(answers)) == 4
        assert browser.ask("document.querySelectorAll('.said')[4].ariaLabel") == f"Answer 4 of 4, by {name}"
        browser.ask(f"document.querySelector('#models input[value={NAME}]').click()")
        setting(browser, runs="1")
        click(browser, "Regenerate")
        browser.wait(IDLE)
        assert browser.ask(SAID)[1:] == answers[2:3]
        assert browser.complaints() == []


@in_browser
def test_a_token_shows_its_probability_and_the_runners_up(opened):
    send(opened, "Hello")
    tokens = opened.ask("[...document.querySelectorAll('.token')].map((token) => token.textContent)")
    assert "".join(tokens) == opened.ask(SAID)[1]
    x, y = opened.ask("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                      "([...document.querySelectorAll('.token')].find((one) => one.getClientRects().length && "
                      "one.getBoundingClientRect().width > 3).getBoundingClientRect())")  # fmt: skip
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    opened.wait("!document.getElementById('tip').hidden")
    rows = opened.ask("[...document.querySelectorAll('#tip tr')].map((row) => row.lastChild.textContent)")
    assert len(rows) in (5, 6)
    shares = [float(row.rstrip("%")) for row in rows[:5]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.3
    assert opened.ask("document.querySelectorAll('#tip tr.drawn').length") == 1


@in_browser
def test_a_token_that_is_tapped_shows_it_too(browser, address):
    browser.open(address, width=390, height=844)
    setting(browser, max_completion_tokens="12", seed="3")
    send(browser, "Hello")
    token = "[...document.querySelectorAll('.token')].find((one) => one.getBoundingClientRect().width > 3)"
    middle = f"(box => ({{x: box.x + box.width / 2, y: box.y + box.height / 2}}))({token}.getBoundingClientRect())"
    for place, hidden in ((browser.ask(middle), False), ({"x": 370, "y": 330}, True)):
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.wait(f"document.getElementById('tip').hidden === {json.dumps(hidden)}")
    small = browser.ask("document.getElementById('more').open = true, [...document.querySelectorAll('button, summary,"
                        "input, textarea')].filter((one) => one.offsetParent).map((one) => "
                        "Math.min(one.offsetWidth, one.offsetHeight)).filter((size) => size < 17)")  # fmt: skip
    assert small == []


@in_browser
def test_by_keyboard_and_for_a_screen_reader(opened):
    send(opened, "Hello")
    opened.ask("document.querySelector('.turn:last-child .said').focus()")
    press(opened, "ArrowRight", 39)
    press(opened, "ArrowRight", 39)
    assert opened.ask("document.querySelectorAll('.token')[1].classList.contains('at')")
    assert "Likeliest:" in opened.ask("document.getElementById('spoken').textContent")
    press(opened, "Escape", 27)
    assert opened.ask("document.getElementById('tip').hidden")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node for node in nodes
        if not node["ignored"] and any(one["name"] == "focusable" for one in node.get("properties", []))
    ]  # fmt: skip
    nameless = [node for node in focusable if not node["name"]["value"] and node["role"]["value"] != "RootWebArea"]
    assert nameless == []
    roles = {node["role"]["value"] for node in nodes}
    assert {"log", "status", "main", "textbox", "button", "heading"} <= roles


@in_browser
def test_it_is_stopped(opened):
    setting(opened, max_completion_tokens="400")
    opened.ask("new MutationObserver(() => { if (document.querySelector('.token')) document.getElementById('stop')"
               ".click(); }).observe(document.getElementById('turns'), {childList: true, subtree: true})")  # fmt: skip
    send(opened, "Hello")
    assert len(opened.ask(SAID)[1]) < 400
    assert opened.ask("document.getElementById('status').textContent") == "Stopped."
    assert opened.complaints() == []


@in_browser
def test_what_is_said_is_never_markup(opened):
    setting(opened, max_completion_tokens="3")
    send(opened, HOSTILE)
    assert opened.ask(SAID)[0] == HOSTILE
    run = {"text": HOSTILE, "tokens": [], "note": "", "error": HOSTILE}
    opened.ask(f"turns = [{{runs: [{json.dumps(run)}], chosen: 0}}], drawAll()")
    assert opened.ask(SAID) == [HOSTILE]
    token = {"text": HOSTILE, "logprob": -1.0, "written": HOSTILE}
    token["likeliest"] = [{"token": HOSTILE, "logprob": -1.0}]
    run = json.dumps(run | {"tokens": [token], "error": ""})
    opened.ask(f"turns = [{{runs: [{run}], chosen: 0}}], drawAll(), showTip(document.querySelector('.token'))")
    assert opened.ask(SAID) == [HOSTILE]
    assert opened.ask("document.querySelectorAll('img').length") == 0
    assert opened.ask("document.title") == NAME
    assert opened.complaints() == []


@in_browser
def test_markup_that_came_in_by_mistake_would_not_run(opened):
    """The policy forbids it: its script, its handlers, its requests."""
    opened.ask(
        "try { document.body.innerHTML = '<b>x</b>'; } catch (error) { document.body.dataset.caught = error.name }"
    )
    assert opened.ask("document.body.dataset.caught") == "TypeError"
    opened.ask("fetch('https://example.org/').catch(() => { document.body.dataset.refused = 'yes' })")
    opened.wait("document.body.dataset.refused === 'yes'")


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(360, True), (360, False), (1600, True)])
def test_no_width_needs_scrolling_sideways_and_dark_is_dark(browser, address, width, dark):
    browser.open(address, width=width, height=740, dark=dark)
    setting(browser, max_completion_tokens="12", runs="2")
    send(browser, "Hello " + 60 * "x")
    browser.ask("document.getElementById('more').open = true")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.getElementById('main').scrollWidth") <= width
    box = browser.ask("(box => [box.bottom, innerHeight])(document.getElementById('send').getBoundingClientRect())")
    assert box[0] <= box[1]
    red = int(browser.ask("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red < 60) == dark


@in_browser
def test_with_a_key_it_asks_for_it(browser):
    with serving(waiting=8) as address:
        browser.open(address)
        browser.wait("document.getElementById('key-label').offsetParent")
        assert "API key" in browser.ask("document.getElementById('status').textContent")
        setting(browser, key=KEY, max_completion_tokens="3")
        browser.wait("document.getElementById('status').textContent === 'Connected.'")
        send(browser, "Hello")
        assert len(browser.ask(SAID)) == 2


@in_browser
def test_a_server_that_has_gone_is_said(browser):
    with serving(key="", waiting=8) as address:
        browser.open(address)
    send(browser, "Hello")
    assert browser.ask("document.getElementById('status').classList.contains('wrong')")
    assert browser.ask("document.querySelector('.run .wrong').textContent")
