"""The site: `python -m docs.site.build` gathers its pages in build/pages and has Zensical make build/docs of them.

Pages are docs/, the notebooks with what they printed and drew, the measurements, and the docstrings. Gathering them
needs nothing of Zensical's, so another generator could take its place. Any warning ends the build.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from nbconvert import MarkdownExporter

from docs.site import repository

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs/site"
PACKAGE = ROOT / "jaxgpt"
BUILD = ROOT / "build"
PAGES = BUILD / "pages"

LINK = re.compile(r"\[((?:[^\]\[]|\[[^\]]*\])*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# Jupyter takes an equation anywhere, Markdown's arithmatex only as a paragraph. It is put in one line: one of its lines
# that began with a minus would begin a list.
EQUATION = re.compile(r"\s*(\$\$.+?\$\$)\s*", re.DOTALL)
# What a browser fetches by itself, from a host of its own. A link to click is none.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*?\shref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s+["'(]?(?:https?:)?//\S+|url\(["']?(?:https?:)?//\S+""",
    re.IGNORECASE,
)


def sources() -> dict[Path, Path]:
    """Returns each file that the site shows, and its place below build/pages."""
    found = {path: Path(path.name) for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".png", ".svg")}
    found |= {ROOT / "CONTRIBUTING.md": Path("contributing.md"), ROOT / "CHANGELOG.md": Path("changelog.md")}
    found |= {path: Path("notebooks", f"{path.stem}.md") for path in (ROOT / "notebooks").glob("*.ipynb")}
    found |= {path: Path("notebooks/answers", path.name) for path in (ROOT / "notebooks/answers").glob("*.md")}
    found |= {path: Path("results", path.name) for path in (ROOT / "benchmarks/results").iterdir()}
    for folder in ("notebooks", "benchmarks/results"):
        found[ROOT / folder / "README.md"] = Path(Path(folder).name, "index.md")
    return found


def gather() -> None:
    """Writes build/pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(SITE, PAGES / "site", ignore=lambda _, names: [name for name in names if unshown(name)])
    for source, place in sources().items():
        (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            text = notebook(source, PAGES / place)
        elif source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
        else:
            shutil.copyfile(source, PAGES / place)
            continue
        text = from_repository(with_indents(with_links(text, source, place)), source)
        (PAGES / place).write_text(text, encoding="utf-8")
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        (PAGES / "api").mkdir(exist_ok=True)
        (PAGES / "api" / f"{folder.name}.md").write_text(api_page(folder), encoding="utf-8")


def unshown(name: str) -> bool:
    return name.startswith("__") or name == "overrides" or name.endswith((".py", ".toml", ".j2", ".md"))


def notebook(source: Path, page: Path) -> str:
    """Returns a notebook's Markdown, with its pictures written beside the page. Nothing is run."""
    exporter = MarkdownExporter(extra_template_basedirs=[str(SITE)], template_file=str(SITE / "notebook.md.j2"))
    resources = {"unique_key": source.stem, "output_files_dir": f"{source.stem}_files"}
    text, resources = exporter.from_filename(str(source), resources=resources)
    for name, data in resources["outputs"].items():
        picture = page.parent / name
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(data)
    parts = FENCED.split(text)
    parts[::2] = (EQUATION.sub(lambda found: f"\n\n{' '.join(found[1].split())}\n\n", part) for part in parts[::2])
    return "".join(parts)


def api_page(folder: Path) -> str:
    """Returns Markdown that asks mkdocstrings for every module of a folder."""
    package = ".".join(folder.relative_to(ROOT).parts)
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    parts = [f"# {package}", *(f"::: {package}.{module}" for module in modules)]
    return "\n\n".join(parts) + "\n"


def with_links(text: str, source: Path, place: Path) -> str:
    """Replaces links to files by links to their pages on the site, to the repository, or by the files' names.

    One that shows a page's file name shows its heading instead.
    """
    shown = sources()

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(source.parent / target))
        if words.endswith(".md") and path in shown:
            words = heading(path)
        if (PAGES / place.parent / target).exists():
            return f"[{words}]({target}{anchor})"  # a notebook's picture, or a file that lies beside the page here too
        if not path.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: there is no {target}")
        if path in shown:
            return f"[{words}]({os.path.relpath(shown[path], place.parent)}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        if address := repository.address():
            return f"[{words}]({repository.file_page(address, name)}{anchor})"
        return words if name in words.replace("`", "") else f"{words} (`{name}`)"

    parts = FENCED.split(text)
    parts[::2] = (LINK.sub(link, part) for part in parts[::2])
    return "".join(parts)


def heading(page: Path) -> str:
    """Returns a page's first heading."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def with_indents(text: str) -> str:
    """Indents lists as Python-Markdown needs them: CommonMark needs less of an indent and fewer empty lines.

    What belongs to an item is indented by four, and an empty line stands before a list, and before an item that follows
    another paragraph of the item before it.
    """
    parts = FENCED.split(text)
    for number in range(0, len(parts), 2):
        lines: list[str] = []
        more, tight = 0, False  # what is added to an item's indents; within a list that has no empty line so far
        for line in parts[number].split("\n"):
            if item := re.match(r"(?:\d+\.|[-*]) +", line):
                if lines and lines[-1] and not tight:
                    lines.append("")
                more, tight = max(0, 4 - len(item[0])), not lines or tight or not lines[-1]
            elif line.startswith("  "):
                line = " " * more + line
            else:
                more, tight = (more, False) if not line else (0, False)
            lines.append(line)
        parts[number] = "\n".join(lines)
    return "".join(parts)


def from_repository(text: str, source: Path) -> str:
    """Returns a page with its source's address and a notebook's way to Colab, where the repository has an address."""
    address = repository.address()
    if address is None:
        return text
    name = source.relative_to(ROOT).as_posix()
    if source.suffix == ".ipynb" and (colab := repository.colab(address, name)):
        text = re.sub("^# .*\n", lambda heading: f"{heading[0]}\n{colab}", text, count=1, flags=re.MULTILINE)
    return f"---\nsource: {repository.file_page(address, name)}\n---\n\n{text}"


def settings() -> dict[str, Any]:
    """Returns zensical.toml with each * of the navigation replaced by the pages there, and the repository's
    address."""
    tables = tomllib.loads((SITE / "zensical.toml").read_text(encoding="utf-8"))
    tables["project"]["theme"]["custom_dir"] = str(SITE / "overrides")
    tables["project"]["nav"] = [expanded(entry) for entry in tables["project"]["nav"]]
    if address := repository.address():
        tables["project"] |= {"repo_url": address, "repo_name": address.split("/", 3)[3]}
    return tables


def expanded(entry: dict[str, Any]) -> dict[str, Any]:
    ((title, pages),) = entry.items()
    if isinstance(pages, str):
        return entry
    there = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))
    rest = [path for path in there if path not in pages]
    found: list[str | dict[str, Any]] = []
    for page in pages:
        if isinstance(page, dict):
            found.append(expanded(page))
        else:
            found += fnmatch.filter(rest, page) if "*" in page else [page]
    return {title: found}


def asks_others() -> list[str]:
    """Returns the pages and style sheets that make their reader's browser ask another host."""
    found = []
    for path in sorted((BUILD / "docs").rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in FETCHED.finditer(path.read_text(encoding="utf-8")):
                found.append(f"{path.relative_to(BUILD)} asks another host: {match[0][:200]}")
    return found


def render(tables: dict[str, Any]) -> int:
    """Has Zensical make build/docs of build/pages, and returns its exit status."""
    (BUILD / "zensical.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run([*command, "--config-file", str(BUILD / "zensical.toml")], check=False).returncode


def main() -> None:
    gather()
    status = render(settings())
    if status or (found := asks_others()):
        raise SystemExit(status or "\n".join(found))
    print("build/docs/index.html")


if __name__ == "__main__":
    main()
