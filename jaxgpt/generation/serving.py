"""`run.py serve`, from its options to a server that listens: what is needed, what is refused, what is printed."""

import importlib.util
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import settings
from jaxgpt.errors import UserError
from jaxgpt.generation import command
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.generation.texts import Batch
from jaxgpt.terminal import say

KEY_VARIABLE = "JAXGPT_API_KEY"
LAST_SECONDS = 30  # that requests have to end when the server is told to


@dataclass(frozen=True)
class Serve:
    """Answers requests as OpenAI's completions API does."""

    run: str
    """The run's folder, such as runs/quickstart."""
    host: str = "127.0.0.1"
    """The address to listen on. Any but this machine's own needs an API key."""
    port: int = 8000
    """The port; 0 takes a free one."""
    name: str = ""
    """The model's name for clients; empty takes the name of the run's folder."""
    key_file: str = ""
    """A file with the API key that clients must send; without it, the environment's JAXGPT_API_KEY."""
    slots: int = 4
    """Texts drawn side by side; each has room for a whole context."""
    waiting: int = 64
    """Texts that may be asked for and not be finished yet; more are refused with status 429."""
    max_tokens: int = 1024
    """The most that a request may ask for."""
    texts: int = 16
    """The most texts of one request: prompts times n."""
    per_minute: int = 600
    """The most requests of one client in a minute; 0 for no limit."""


def serve(options: Serve) -> int:
    """Listens until Ctrl-C or SIGTERM; then what has begun is finished. UserError for options that can't be."""
    for key in ("slots", "waiting", "max_tokens", "texts"):
        settings.check_number(getattr(options, key), "", key, positive=True)
    settings.check_number(options.per_minute, "", "per_minute")
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"serve needs {' and '.join(missing)}: make env EXTRAS=serve (or pip install -e '.[serve]') installs it"
        )
    key, loopback = _key(options), is_loopback(options.host)
    if not loopback and not key:
        raise UserError(
            f"--host {options.host}: others could reach the server, so an API key is needed: name a file that has one "
            f"by --key-file, or set {KEY_VARIABLE}"
        )
    listening = _listen(options.host, options.port)
    with listening:
        return _run(options, key, loopback, listening)


def _run(options: Serve, key: str, loopback: bool, listening: socket.socket) -> int:
    import uvicorn  # here, because others of the commands don't have it

    from jaxgpt.generation import api, server
    from jaxgpt.generation.worker import Worker

    config, params, tokenizer = command.load(Path(options.run))
    model = only_known_tokens(config.model, tokenizer)
    decoder = Decoder(params, model, config.compute, slots=options.slots, capacity=model.context)
    del params
    worker = Worker(Batch(decoder, tokenizer))
    name = options.name or Path(options.run).resolve().name
    chosen = server.Options(
        name=name,
        vocabulary_size=model.vocabulary_size,
        limits=api.Limits(model.context, min(options.max_tokens, model.context), options.texts),
        waiting=options.waiting,
        per_minute=options.per_minute,
        key=key,
        loopback=loopback,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving   {name} at http://{shown}:{port}/v1 ({'an API key is needed' if key else 'no API key'})", flush=True)
    say(f"try       curl http://{shown}:{port}/v1/models; Ctrl-C ends it", flush=True)
    uvicorn.Server(
        uvicorn.Config(
            server.Server(worker, tokenizer, chosen).app(),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=LAST_SECONDS,
            h11_max_incomplete_event_size=1 << 16,
            proxy_headers=False,
            server_header=False,
        )
    ).run(sockets=[listening])
    worker.stop()
    return 0


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name, of which nobody knows where it will lead


def _key(options: Serve) -> str:
    if not options.key_file:
        return os.environ.get(KEY_VARIABLE, "").strip()
    try:
        key = Path(options.key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--key-file {options.key_file}: can't be read ({reason})") from None
    if not key:
        raise UserError(f"--key-file {options.key_file}: there is no key in it")
    return key


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, and must be from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: can't listen there ({error.strerror or error}). Another "
            "--port may be free; 0 takes one that is"
        ) from None
