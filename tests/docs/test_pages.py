"""What the pages show beside shell lines: options made of the code, costs that are arithmetic, links, TOML, Python."""

import re
import tomllib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs.site import configuration
from jaxgpt.commands.configuration import without_text
from jaxgpt.evaluation import descriptions
from jaxgpt.models import gpt2
from jaxgpt.options import settings
from jaxgpt.proof import cases, gradcheck
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
    """Or describes a task."""
    for name, block in FENCED.findall(path.read_text(encoding="utf-8")):
        if name == "toml":
            (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
            if "answer" in tomllib.loads(block):
                descriptions.read_description(tmp_path / "shown.toml")
            else:
                settings.check(settings.read(tmp_path / "shown.toml"))


def test_every_page_has_its_place_in_the_site():
    """And the README's list of them, or index.md's, leads to each."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    named = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    for page in (path.name for path in (ROOT / "docs").glob("*.md")):
        assert page in named
        assert page == "index.md" or f"({page})" in index


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
    """A case as the page makes it, among the names of proof/cases.py."""
    (source,) = (block for block in blocks("adding_a_layer.md", "python") if "def rmsnorm_case" in block)
    names = vars(cases) | {"rmsnorm": rmsnorm}
    exec(compile(source, "adding_a_layer.md", "exec"), names)
    return names["rmsnorm_case"]


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


def test_the_tests_of_the_page_pass(x64, rmsnorm):
    (source,) = (block for block in blocks("adding_a_layer.md", "python") if "def test_dx_is_orthogonal" in block)
    names = {"np": np, "jnp": jnp, "rmsnorm": rmsnorm}
    exec(compile(source[source.index("def test_dx") :], "adding_a_layer.md", "exec"), names)
    names["test_dx_is_orthogonal_to_x"](None)


def test_python_on_the_pages_parses():
    for path in PAGES:
        for name, block in FENCED.findall(path.read_text(encoding="utf-8")):
            if name == "python":
                compile(block, path.name, "exec")
            elif name == "toml":
                tomllib.loads(block)


# The site


def test_what_would_ask_another_host_is_found():
    """The build fails on such a page; a link to click is none."""
    pytest.importorskip("mkdocs", reason="the site is built with MkDocs, of the docs extra")
    from docs.site import hooks

    asks = [
        '<script src="https://example.org/x.js">',
        "<img alt='' src='//example.org/x.png'>",
        '<link rel="stylesheet" href="https://example.org/x.css">',
        "@import 'https://example.org/x.css'",
        "src: url(https://example.org/x.woff)",
    ]
    asks_not = [
        '<a href="https://example.org/">',
        '<script src="assets/x.js">',
        '<link rel="canonical" href="https://x/">',
    ]
    assert all(hooks.FETCHED.search(text) for text in asks)
    assert not any(hooks.FETCHED.search(text) for text in asks_not)


def test_every_module_has_its_place_in_the_api():
    pytest.importorskip("mkdocs", reason="the site is built with MkDocs, of the docs extra")
    from docs.site import hooks

    named = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    for folder in {path.parent for path in (ROOT / "jaxgpt").rglob("*.py")}:
        assert f"api/{folder.name}.md" in named
        page = hooks.api_page(folder)
        assert all(f".{path.stem}\n" in page for path in folder.glob("*.py") if path.stem != "__init__")
