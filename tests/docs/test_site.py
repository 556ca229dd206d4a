"""The site, as docs/site/build.py gathers it for Zensical: every page is there and found, and asks no other host."""

import base64
import json
import re
import shutil
import subprocess
import tomllib

import pytest

from tests.docs.commands import ROOT

pytest.importorskip("nbconvert", reason="the site is built with the packages of the docs extra")
from docs.site import build

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All pages as Markdown, in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PAGES", tmp_path_factory.mktemp("site") / "pages")
        patch.setattr(build.repository, "address", lambda: None)
        build.gather()
        yield build.PAGES


def places(nav):
    for page in nav:
        if isinstance(page, str):
            yield page
        else:
            ((_, below),) = page.items()
            yield from [below] if isinstance(below, str) else places(below)


def test_every_page_is_once_in_the_navigation(pages):
    named = list(places(build.settings()["project"]["nav"]))
    assert sorted(named) == sorted(path.relative_to(pages).as_posix() for path in pages.rglob("*.md"))


def test_the_list_of_pages_on_the_first_one_is_complete():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "index.md")


def test_every_module_has_its_place_in_the_api(pages):
    for path in (ROOT / "jaxgpt").rglob("*.py"):
        if path.stem != "__init__":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert f"::: {module}\n" in (pages / f"api/{path.parent.name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shown_whole_as_it_was_run(pages, path):
    page = (pages / "notebooks" / f"{path.stem}.md").read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    words = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for equation in re.findall(r"\$\$.+?\$\$", words, re.DOTALL):
        assert f"\n\n{' '.join(equation.split())}\n\n" in page  # in one line: none of it begins a list
    pictures = set()
    for cell in code:
        assert f"```python\n{''.join(cell['source'])}\n```" in page
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                assert "".join(output["text"]).rstrip() in page
            elif "image/png" in output["data"]:
                pictures.add(base64.b64decode("".join(output["data"]["image/png"])))
    drawn = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert {(pages / "notebooks" / name).read_bytes() for name in drawn} == pictures


@pytest.mark.parametrize(
    ("text", "source", "place", "shown"),
    [
        ("[a](numerics.md#sums)", "docs/lora.md", "lora.md", "[a](numerics.md#sums)"),
        ("[a](../notebooks/README.md)", "docs/lora.md", "lora.md", "[a](notebooks/index.md)"),
        ("[a](04_gelu.ipynb)", "notebooks/README.md", "notebooks/index.md", "[a](04_gelu.md)"),
        ("[numerics.md](numerics.md#text)", "docs/lora.md", "lora.md", "[Numerics](numerics.md#text)"),
        ("[docs/muon.md](docs/muon.md)", "CONTRIBUTING.md", "contributing.md", "[Muon](muon.md)"),
        ("[code](../jaxgpt/models/gpt2.py)", "docs/lora.md", "lora.md", "code (`jaxgpt/models/gpt2.py`)"),
        ("[`LICENSE`](../LICENSE)", "docs/lora.md", "lora.md", "`LICENSE`"),
        ("[out](https://example.org/a.md)", "docs/lora.md", "lora.md", "[out](https://example.org/a.md)"),
        ("```sh\n[a](b)\n```", "docs/lora.md", "lora.md", "```sh\n[a](b)\n```"),
    ],
)
def test_links_lead_to_the_site(pages, text, source, place, shown):
    assert build.with_links(text, ROOT / source, build.Path(place)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1. a\n2. b\n", "1. a\n2. b\n"),
        ("a\n\n- b\n- c\n", "a\n\n- b\n- c\n"),
        ("a:\n- b\n- c\n", "a:\n\n- b\n- c\n"),
        ("1. a\n\n   b\n2. c\n3. d\n", "1. a\n\n    b\n\n2. c\n3. d\n"),
        ("- a\n  b\n  - c\n\nd\n\n    e\n", "- a\n    b\n    - c\n\nd\n\n    e\n"),
        ("1. a\n\n   ```sh\n   x\n   ```\n", "1. a\n\n    ```sh\n    x\n    ```\n"),
        ("```\n- a\n  b\n```\n", "```\n- a\n  b\n```\n"),
    ],
)
def test_what_belongs_to_an_item_stays_in_it(text, shown):
    assert build.with_indents(text) == shown


def test_a_link_to_nothing_ends_the_build(pages):
    with pytest.raises(SystemExit, match=r"there is no nothing\.md"):
        build.with_links("[a](nothing.md)", ROOT / "docs/lora.md", build.Path("lora.md"))


@pytest.mark.parametrize("words", ["backpropagation", "gradient checkpointing", "fine-tuning", "overfitting"])
def test_what_people_look_for_is_called_so(pages, words):
    assert any(words in path.read_text(encoding="utf-8").lower() for path in pages.rglob("*.md"))


def test_what_would_ask_another_host_is_found():
    """The build fails on such a page; a link to click is none."""
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
    assert all(build.FETCHED.search(text) for text in asks)
    assert not any(build.FETCHED.search(text) for text in asks_not)


def test_the_scripts_and_styles_are_there(pages):
    project = tomllib.loads((ROOT / "docs/site/zensical.toml").read_text(encoding="utf-8"))["project"]
    for name in [*project["extra_css"], *project["extra_javascript"], *project["extra"]["polyfills"]]:
        assert (pages / name).is_file()
    style = (ROOT / "docs/site/katex/katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\(([^)]+)\)", style))
    assert fonts == {f"fonts/{path.name}" for path in (ROOT / "docs/site/katex/fonts").iterdir()}


def test_katex_knows_every_formula(pages, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("KaTeX is asked by Node.js, and there is none")
    formulas = []
    for path in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        if path.parent.name == "notebooks":
            formulas += [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$]*[^$\s])?)\$", text, re.DOTALL)]
    assert len(formulas) > 500
    (tmp_path / "formulas.json").write_text(json.dumps(formulas), encoding="utf-8")
    script = """
        const katex = require(process.argv[1]);
        for (const formula of require(process.argv[2])) katex.renderToString(formula, { strict: "ignore" });
    """
    names = [str(ROOT / "docs/site/katex/katex.min.js"), str(tmp_path / "formulas.json")]
    done = subprocess.run([node, "-e", script, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
