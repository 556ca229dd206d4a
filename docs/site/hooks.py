"""What MkDocs is told beyond its settings: pages made of the docstrings, links that leave docs/, and no other hosts.

Called by MkDocs by these names. A warning here ends the build, as all warnings do (`strict`).
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "jaxgpt"
RESULTS = "benchmarks/results"  # pages of the site too, since others link to them

STYLE = ".md-grid { max-width: 84rem; }\n"  # wide enough for a line of the docstrings' equations

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
# What a browser fetches by itself, from a host of its own. A link to click is none.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*?\shref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s+["'(]?(?:https?:)?//\S+|url\(["']?(?:https?:)?//\S+""",
    re.IGNORECASE,
)

log = logging.getLogger("mkdocs.hooks.jaxgpt")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the API, one for each folder of the package, and the measurements."""
    folders = sorted({path.parent for path in (ROOT / PACKAGE).rglob("*.py")})
    for folder in folders:
        files.append(File.generated(config, f"api/{folder.name}.md", content=api_page(folder)))
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    files.append(File.generated(config, "style.css", content=STYLE))
    return files


def api_page(folder: Path) -> str:
    """Markdown that asks mkdocstrings for every module of a folder."""
    package = ".".join(folder.relative_to(ROOT).parts)
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    parts = [f"# {package}", *(f"::: {package}.{module}" for module in modules)]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file outside of docs/ becomes one to its page on the site, or the file's name."""
    here = ROOT / "docs"
    if page.file.src_uri.startswith("results/"):
        here = ROOT / RESULTS

    def inside(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = Path(os.path.normpath(here / target))
        if not path.exists():
            log.warning("%s: there is no %s", page.file.src_uri, target)
        name = path.relative_to(ROOT).as_posix()
        for folder, place in ((RESULTS, "results"), ("docs", "")):
            if path.is_relative_to(ROOT / folder):
                there = os.path.relpath(Path(place, path.relative_to(ROOT / folder)), Path(page.file.src_uri).parent)
                return f"[{text}]({there}{anchor or ''})"
        return text if name in text.replace("`", "") else f"{text} (`{name}`)"

    return LINK.sub(inside, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Whether a page, or a style sheet, has its reader's browser ask another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in FETCHED.finditer(path.read_text(encoding="utf-8")):
                log.warning("%s asks another host: %s", path.relative_to(config.site_dir), match[0][:200])
