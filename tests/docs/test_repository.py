"""The repository's address on the site: which remotes have a page, and the links that pages get where there is one."""

import re
import shutil
import subprocess

import pytest

from tests.docs.commands import ROOT
from tests.reports.browser import find

pytest.importorskip("nbconvert", reason="the site is built with the packages of the docs extra")
from docs.site import build, repository

PAGE = "https://github.com/owner/name"
GIT = shutil.which("git")


@pytest.fixture
def address(monkeypatch):
    """Sets the repository's address, or takes it away."""

    def choose(page: str | None) -> None:
        monkeypatch.setattr(repository, "address", lambda: page)

    return choose


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/owner/name",
        "https://github.com/owner/name/",
        "https://github.com/owner/name.git",
        "https://GitHub.com/owner/name.git\n",
        "http://github.com/owner/name",
        "https://user@github.com/owner/name.git",
        "https://user:token@github.com/owner/name.git",
        "https://:token@github.com/owner/name",
        "ssh://git@github.com/owner/name.git",
        "ssh://github.com:22/owner/name",
        "ssh://git@ssh.github.com:443/owner/name.git",
        "git@github.com:owner/name.git",
        "github.com:owner/name",
    ],
)
def test_an_address_at_a_hosting_site_is_its_page(remote):
    assert repository.page_of(remote) == PAGE


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("git@gitlab.com:group/below/my-name.x.git", "https://gitlab.com/group/below/my-name.x"),
        ("https://git.example.org:8443/o/n.git", "https://git.example.org:8443/o/n"),
        ("ssh://git@git.example.org:2222/o/n.git", "https://git.example.org/o/n"),
    ],
)
def test_other_hosts_have_pages_too(remote, page):
    assert repository.page_of(remote) == page


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "\n",
        "name",
        "/srv/git/name.git",
        "../owner/name",
        "~/owner/name",
        "./a.example.org:owner/name",
        r"C:\owner\name",
        "C:/owner/name",
        "file:///srv/owner/name.git",
        "git://github.com/owner/name",
        "javascript:alert/1",
        "javascript://github.com/owner/name",
        "data:text/html,owner/name",
        "machine:owner/name",
        "git@10.0.0.1:owner/name.git",
        "http://localhost:3000/owner/name",
        "http://git.example.org:8080/owner/name",
        "https://github.com",
        "https://github.com/owner",
        "https://github.com/owner/../name",
        "https://github.com/owner//name",
        "https://github.com/.git/name",
        "https://github.com/owner/name?a=b",
        "https://github.com/owner/name#a",
        "https://github.com/owner/na me",
        "https://github.com/owner/name\nhttps://github.com/owner/name",
        'https://github.com/owner/name"><script>',
        "https://github.com/owner/n%61me",
        "https://user:to/ken@github.com/owner/name",
        "https://user:to@ken@github.com/owner/name",
        "https://github.com@/owner/name",
        "https://exämple.org/owner/name",
    ],
)
def test_what_is_no_such_address_has_no_page(remote):
    assert repository.page_of(remote) is None


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """A folder in which the address is looked for, with the variable unset."""
    monkeypatch.delenv(repository.VARIABLE, raising=False)
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    repository.address.cache_clear()
    yield tmp_path
    repository.address.cache_clear()


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.mark.skipif(GIT is None, reason="git isn't here")
@pytest.mark.parametrize(("remote", "page"), [("git@github.com:owner/name.git", PAGE), ("/srv/name", None)])
def test_a_clone_has_its_origins_page(clone, remote, page):
    git(clone, "init")
    git(clone, "remote", "add", "origin", remote)
    assert repository.address() == page


@pytest.mark.skipif(GIT is None, reason="git isn't here")
def test_a_clone_without_an_origin_has_none(clone):
    git(clone, "init")
    assert repository.address() is None


@pytest.mark.skipif(GIT is None, reason="git isn't here")
def test_an_archive_unpacked_in_a_clone_of_something_else_has_none(clone, monkeypatch):
    git(clone, "init")
    git(clone, "remote", "add", "origin", "https://github.com/some/thing_else")
    (clone / "jaxgpt").mkdir()
    monkeypatch.setattr(repository, "ROOT", clone / "jaxgpt")
    assert repository.address() is None


def test_the_variable_goes_before_the_clone(clone, monkeypatch):
    monkeypatch.setenv(repository.VARIABLE, "https://user:token@github.com/owner/name")
    assert repository.address() == PAGE


def test_none_is_no_address(clone, monkeypatch):
    monkeypatch.setenv(repository.VARIABLE, "none")
    assert repository.address() is None


def test_a_wrong_variable_ends_the_build_and_is_not_shown_as_it_may_have_a_password(clone, monkeypatch):
    monkeypatch.setenv(repository.VARIABLE, "https://user:token@github.com")
    with pytest.raises(SystemExit, match=r"JAXGPT_REPOSITORY must be https://HOST/OWNER/NAME") as said:
        repository.address()
    assert "token" not in str(said.value)


@pytest.mark.parametrize(
    ("page", "file"),
    [
        (PAGE, f"{PAGE}/blob/main/a.py"),
        ("https://git.example.org:8443/o/n", "https://git.example.org:8443/o/n/blob/main/a.py"),
        ("https://gitlab.com/a/b/c", "https://gitlab.com/a/b/c/-/blob/main/a.py"),
        ("https://codeberg.org/o/n", "https://codeberg.org/o/n/src/branch/main/a.py"),
    ],
)
def test_a_link_out_of_the_site_leads_to_the_file_as_its_host_shows_it(address, page, file):
    address(page)
    shown = build.with_links("[code](../Makefile)", ROOT / "docs/lora.md", build.Path("lora.md"))
    assert shown == f"[code]({file.replace('a.py', 'Makefile')})"


def test_a_page_names_its_source_and_a_notebook_opens_in_colab_from_github(address):
    notebook, text = ROOT / "notebooks/04_gelu.ipynb", "\n# 4. GELU\n\nText\n"
    address(None)
    assert build.from_repository(text, notebook) == text
    address("https://gitlab.com/owner/name")
    source = "source: https://gitlab.com/owner/name/-/blob/main/notebooks/04_gelu.ipynb"
    assert build.from_repository(text, notebook) == f"---\n{source}\n---\n\n{text}"
    address(PAGE)
    shown = build.from_repository(text, notebook)
    assert "https://colab.research.google.com/github/owner/name/blob/main/notebooks/04_gelu.ipynb" in shown
    assert "pip install -q ./name\n%cd name/notebooks\n" in shown
    assert shown.index("# 4. GELU") < shown.index("Open in Colab") < shown.index("Text")
    assert "Colab" not in build.from_repository("# LoRA\n", ROOT / "docs/lora.md")


@pytest.fixture
def site(address, monkeypatch, tmp_path):
    """Builds a site of two pages whose repository has an address or none, and returns the second page's HTML."""
    pytest.importorskip("zensical", reason="the site is built with the packages of the docs extra")
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setattr(build, "PAGES", tmp_path / "pages")

    def make(page: str | None) -> str:
        address(page)
        build.PAGES.mkdir(exist_ok=True)
        for name, source in {"index": "docs/index.md", "gelu": "notebooks/04_gelu.ipynb"}.items():
            text = build.from_repository(f"# {name}\n\nText\n", ROOT / source)
            (build.PAGES / f"{name}.md").write_text(text, encoding="utf-8")
        tables = build.settings()
        tables["project"] |= {"nav": ["index.md", "gelu.md"], "extra_css": [], "extra_javascript": []}
        del tables["project"]["plugins"]["mkdocstrings"]
        assert build.render(tables) == 0
        return (tmp_path / "docs/gelu.html").read_text(encoding="utf-8")

    return make


def test_a_built_page_has_the_links_where_there_is_an_address_and_none_where_not(site):
    links = re.findall(r'<a href="(https://[^"]*)"', site(PAGE))
    assert PAGE in links
    assert f"{PAGE}/blob/main/notebooks/04_gelu.ipynb" in links
    assert "https://colab.research.google.com/github/owner/name/blob/main/notebooks/04_gelu.ipynb" in links
    without = site(None)
    assert "github.com/owner" not in without
    assert "colab" not in without
    assert "md-source" not in without


@pytest.mark.slow
@pytest.mark.skipif(find() is None, reason="no chromium here (Debian: apt install chromium)")
def test_the_link_to_the_repository_asks_its_host_for_nothing(site, tmp_path):
    """The theme's own asks GitHub for the number of stars, from every reader's browser."""
    from tests.reports.browser import Browser

    site(PAGE)
    with Browser(find() or "", tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=(tmp_path / "docs/gelu.html").as_uri())
        browser.wait("document.readyState === 'complete' && document.querySelector('.md-source')")
        browser.ask("new Promise(resolve => setTimeout(resolve, 2000))")
        assert browser.requests() == []
