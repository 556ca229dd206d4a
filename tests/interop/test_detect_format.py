"""Models of the hub by name, from a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import pytest

from jaxgpt import writing
from jaxgpt.data.chat_templates import Template
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, huggingface, safetensors_files
from tests.interop.weights import MODEL, assert_same_bits, random_params

COMMIT = "a" * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder of repositories, OWNER/NAME/FILE, which are then on the hub."""
    pytest.importorskip("huggingface_hub", reason="downloads with huggingface-hub, of the extra hub")
    from huggingface_hub import constants

    root = tmp_path / "hub"
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            asked.append(self.path)
            repository = root.joinpath(*(parts[2:4] if parts[0] == "api" else parts[:2]))
            if not repository.is_dir():
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            elif parts[0] == "api" and "tree" in parts:
                rows = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in repository.iterdir()
                ]
                self.answer(json.dumps(rows).encode(), Content_Type="application/json")
            elif parts[0] == "api":
                siblings = [{"rfilename": path.name} for path in repository.iterdir()]
                about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings, "private": False}
                self.answer(json.dumps(about).encode(), Content_Type="application/json")
            elif (repository / parts[-1]).is_file():
                content = (repository / parts[-1]).read_bytes()
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path)
        yield root, asked
        served.shutdown()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 3000])
def test_a_model_by_name(server, shard_bytes):
    """Its files are downloaded, but for pickles, and not twice."""
    root, asked = server
    with writing.new_folder(root / "someone" / "tiny") as folder:
        huggingface.write_folder(folder, random_params(), MODEL, "float32", None, shard_bytes)
    (root / "someone/tiny/chat_template.jinja").write_text("{{ messages }}")
    (root / "someone/tiny/pytorch_model.bin").write_bytes(b"\x80\x04N.")
    source = detect_format.open_weights("someone/tiny")
    assert source.model == MODEL
    assert source.template == Template("jinja", "{{ messages }}")
    assert_same_bits(source.load(), random_params())
    assert not any("pytorch_model.bin" in path for path in asked)
    asked.clear()
    assert_same_bits(detect_format.open_weights("someone/tiny@main").load(), random_params())
    assert not [path for path in asked if path.endswith(".safetensors")]


def test_a_model_of_pickles_only(server):
    root, _ = server
    with writing.new_folder(root / "someone" / "old") as folder:
        huggingface.write_folder(folder, random_params(), MODEL, "float32", None, 1 << 30)
        (folder / safetensors_files.WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"this model has no safetensors. Pickles .* are not read"):
        detect_format.open_weights("someone/old")
    with pytest.raises(UserError, match="someone/none: there is no such file or folder here, and from the Hugging"):
        detect_format.open_weights("someone/none")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="the package huggingface-hub is needed: make env EXTRAS=hub"):
        detect_format.fetch("gpt2")


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "a b", "../x", "/etc/x", "a/b@c d"])
def test_what_is_no_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect_format, "fetch", lambda name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(UserError, match=r"there is no such|without weights"):
        detect_format.open_weights(name)
    assert not list(Path().iterdir())
