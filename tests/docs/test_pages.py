"""The pages beside their shell lines: options made from the code, costs that are arithmetic, links, TOML, Python."""

import inspect
import itertools
import re
import tomllib
from types import ModuleType

import jax
import pytest

from docs.site import configuration
from jaxgpt.commands import gradcheck as gradcheck_command
from jaxgpt.commands.configuration import without_text
from jaxgpt.evaluation import descriptions
from jaxgpt.models import gpt2
from jaxgpt.options import checks, settings
from jaxgpt.proof import cases, gradcheck, objective_cases
from jaxgpt.proof.gradcheck import Case
from jaxgpt.training import flops
from jaxgpt.training.flops import PEAKS
from tests.docs.commands import PAGES, ROOT

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [block for name, block in FENCED.findall(text) if name == language]


def test_the_page_of_options_is_todays():
    assert configuration.page() == configuration.PAGE.read_text(encoding="utf-8"), (
        "an option or a config has changed: python -m docs.site.configuration writes the page anew"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_toml_on_the_pages_is_a_configuration(path, tmp_path):
    """A block of TOML is a configuration or describes a task."""
    for name, block in FENCED.findall(path.read_text(encoding="utf-8")):
        if name == "toml":
            (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
            if "answer" in tomllib.loads(block):
                descriptions.read_description(tmp_path / "shown.toml")
            else:
                checks.check(settings.read(tmp_path / "shown.toml"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]+))?\)", text):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


# The costs of training


def config_of(name: str):
    return without_text(settings.read(settings.find_config(name)))


def operations(name: str) -> tuple[int, int]:
    """(operations for a token, tokens)."""
    config = config_of(name)
    training = config.training
    tokens = training.steps * training.batch_size * training.micro_batches * training.sequence_length
    return flops.per_token(config.model, training.sequence_length), tokens


def hours(name: str, device: str, count: int) -> str:
    peak = PEAKS[device][0]
    assert peak is not None
    each, tokens = operations(name)
    return f"{each * tokens / (0.38 * 1e12 * peak * count) / 3600:.1f}"


def test_the_costs_are_the_arithmetic_that_is_shown():
    text = (ROOT / "docs/training_gpt2.md").read_text(encoding="utf-8")
    each, tokens = operations("gpt2_124m_fineweb")
    model = config_of("gpt2_124m_fineweb").model
    for figure in (f"{gpt2.parameter_count(model):,}", f"{each:,}", f"{tokens:,}", f"{each * tokens:.3e}"):
        assert f"| {figure.replace('e+', 'e')} |" in text
    assert f"| {12 * gpt2.parameter_count(model, padded=True) / 1e9:.2f} GB |" in text
    devices = {
        "8 H100": ("NVIDIA H100", 8),
        "1 H100": ("NVIDIA H100", 1),
        "1 A100": ("NVIDIA A100", 1),
        "1 RTX 4090": ("NVIDIA GeForce RTX 4090", 1),
    }
    for shown, (device, count) in devices.items():
        assert re.search(
            rf"^\| {shown} \| .*{PEAKS[device][0]:g} TFLOP/s \| {hours('gpt2_124m_fineweb', device, count)} \|$",
            text,
            re.MULTILINE,
        ), shown
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for name, *figures in rows:
        each, tokens = operations(name)
        total = f"{each * tokens:.3e}".replace("e+", "e")
        assert figures == [f"{each:,}", f"{tokens:,}", total, hours(name, "NVIDIA H100", 8)]


def test_the_tolerances_are_gradchecks():
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    for dtype in ("float32", "bfloat16"):
        one, many = (re.sub("e([+-])0", r"e\1", f"{gradcheck.tolerance(dtype, depth):.1e}") for depth in (1, 26))
        assert re.search(rf"^\| {dtype} \| .* \| {one} \| {many} \|$", text, re.MULTILINE)


def test_the_number_of_gradients_is_todays(x64):
    """Rows of gradcheck without --config, one for each tensor, in README."""
    shapes = gradcheck_command._shapes("")
    key = jax.random.key(0)
    every = itertools.chain(cases.cases(*shapes, key), objective_cases.cases(*shapes, key))
    count = sum(len(jax.tree.leaves(case.inputs)) for case in every)
    said = re.findall(r"(\d+) of (\d+) gradients agree", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said == [(str(count), str(count))]


def test_the_badges_say_what_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = (ROOT / "docs/badges.svg").read_text(encoding="utf-8")
    for badge in (project["requires-python"].removeprefix(">=") + "+", project["license"]):
        assert f">{badge}</text>" in badges


# The layer that is added


@pytest.fixture(scope="module")
def rmsnorm():
    """The module that the page writes, which is the package's own."""
    (source,) = (block for block in blocks("adding_a_layer.md", "python") if block.startswith('"""Root mean'))
    assert source.strip() == (ROOT / "jaxgpt/layers/rmsnorm.py").read_text(encoding="utf-8").strip()
    module = ModuleType("rmsnorm")
    exec(compile(source, "adding_a_layer.md", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def case(rmsnorm):
    """The function that the page writes, in a file that has nothing but what the page imports."""
    return vars(module_of("def rmsnorm_case"))["rmsnorm_case"]


def module_of(words: str) -> ModuleType:
    """The block of adding_a_layer.md that has these words, as a module."""
    (source,) = (block for block in blocks("adding_a_layer.md", "python") if words in block)
    module = ModuleType("shown")
    exec(compile(source, "adding_a_layer.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 17)])
def test_the_layer_of_the_page_is_right(assert_exact, case, shape):
    assert_exact(case(jax.random.key(0), *shape))


def test_a_term_that_the_layer_of_the_page_forgot_would_be_seen(x64, rmsnorm, case):
    whole = case(jax.random.key(0), 2, 3, 17)

    def without(inputs, dy):
        gradients = whole.backward(inputs, dy)
        _, residuals = rmsnorm.forward(inputs["params"], inputs["x"])
        return gradients | {"x": dy * inputs["params"].scale * residuals.rstd}

    wrong = Case("wrong", whole.inputs, whole.forward, without)
    assert [row.passed for row in gradcheck.check(wrong, "float64")] == [True, False]


def test_the_tests_of_the_page_pass(assert_exact, x64):
    shown = vars(module_of("def test_dx_is_orthogonal"))
    shown["test_dx_is_orthogonal_to_x"](None)
    shown["test_gradients"].hypothesis.inner_test(assert_exact, B=1, T=1, C=2)


def test_the_line_of_the_page_is_in_cases():
    (line,) = re.findall("`(yield .*)`", (ROOT / "docs/adding_a_layer.md").read_text(encoding="utf-8"))
    assert line in inspect.getsource(cases.cases)


def test_python_on_the_pages_parses():
    for path in PAGES:
        for name, block in FENCED.findall(path.read_text(encoding="utf-8")):
            if name == "python":
                compile(block, path.name, "exec")
            elif name == "toml":
                tomllib.loads(block)
