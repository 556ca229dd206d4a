"""`run.py serve`: checks the options, loads the model, and starts a server that listens."""

import gc
import importlib.util
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt import files
from jaxgpt.data import chat_templates
from jaxgpt.data.chat_templates import Template
from jaxgpt.errors import Terminated, UserError, reason
from jaxgpt.foreign_text import shown
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.interop import loading
from jaxgpt.options import checks, command_line
from jaxgpt.terminal import say

if TYPE_CHECKING:
    from jaxgpt.generation import server

KEY_VARIABLE = "JAXGPT_API_KEY"
LARGEST_KEY = 4096  # bytes


@dataclass(frozen=True)
class Serve:
    """Serves a model with OpenAI's API, and a page to chat with it."""

    run: str
    """Folder of a run, such as runs/quickstart, or weights in another format, such as a Hugging Face folder."""
    beside: tuple[str, ...] = ()
    """Further runs or weights, served beside it under their folders' names; the page shows their answers side by
    side."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    name: str = ""
    """Name of --run's model for clients; empty takes the name of its folder."""
    template: str = ""
    """Chat template for all models: chatml, llama3, mistral, or a file with a Jinja template; empty takes the one that
    each was trained with, and chatml where it was trained with none."""
    key_file: str = ""
    """File with the API key that clients must send; without it, the environment's JAXGPT_API_KEY."""
    slots: int = 4
    """Number of texts that a model draws side by side; each has room for a whole context."""
    waiting: int = 64
    """Number of requested texts that may be unfinished at once; more are refused with status 429."""
    max_tokens: int = 1024
    """Largest number of tokens that a request may ask for."""
    texts: int = 16
    """Largest number of texts in one request: prompts times n."""
    per_minute: int = 600
    """Largest number of requests of one client in a minute; 0 for no limit."""
    wrong_keys: int = 20
    """Largest number of wrong API keys of one client in a minute, before all of its keys are refused for a while; 0
    for no limit. Behind a proxy all clients count as one."""
    connections: int = 256
    """Largest number of connections at once, at most what the limit of open files (ulimit -n) allows; more are
    answered with 503."""


def run(words: list[str]) -> int:
    """Listens until Ctrl-C or SIGTERM, and then finishes the requests that have begun.

    UserError where an option is out of its bounds, a package is missing, an API key is needed, or the address can't be
    listened on; Terminated where the server was ended by SIGTERM.
    """
    options = command_line.read(Serve, words, "serve")
    positive = ("slots", "waiting", "max_tokens", "texts", "connections")
    checks.check_own(options, positive, ("per_minute", "wrong_keys"))
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"serve needs {' and '.join(missing)}: make env EXTRAS=serve (or pip install -e '.[serve]') installs it"
        )
    from jaxgpt.generation import gate  # here, because it needs packages that the other commands don't

    key, (family, address) = _key(options), _resolve(options.host, options.port)
    loopback = gate.is_loopback(address[0])
    if not loopback and not key:
        raise UserError(
            f"--host {shown(options.host)}: others could reach the server, so an API key is needed: name a file that "
            f"has one by --key-file, or set {KEY_VARIABLE}"
        )
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _listen(options, family, address) as listening:
            _run(options, key, loopback, listening)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminated(number: int, frame: object) -> None:
    raise Terminated("stopped by SIGTERM")


def _run(options: Serve, key: str, loopback: bool, listening: socket.socket) -> None:
    from jaxgpt.generation import connections, server

    named = _names(options)
    hosted = [_hosted(run, name, [*named], options) for name, run in named.items()]
    chosen = server.Options(
        waiting=options.waiting,
        per_minute=options.per_minute,
        key=key,
        loopback=loopback,
        wrong_keys=options.wrong_keys,
    )
    # JAX's many objects stay alive. Frozen, they are left out of garbage collections, for which all threads wait and
    # which are then ten times as fast.
    gc.collect()
    gc.freeze()
    most = connections.most_connections(options.connections)
    try:
        answering = server.Server(hosted, chosen)
        _tell([*named], listening, key, most if most < options.connections else 0)
        connections.log_to_stderr()
        connections.Listener(answering.app(), most, answering.end).run(sockets=[listening])
    finally:
        for model in hosted:
            model.worker.stop()


def _names(options: Serve) -> dict[str, str]:
    """Returns the runs by the names that clients know them by. UserError where two have the same."""
    runs = [options.run, *options.beside]
    names = [Path(run).resolve().name for run in runs]
    names[0] = options.name or names[0]
    same = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if same is not None:
        raise UserError(
            f"--beside {shown(runs[same])}: {shown(runs[names.index(names[same])])} has the name {shown(names[same])} "
            "too: give --run another by --name, or rename one of the folders"
        )
    return dict(zip(names, runs, strict=True))


def _hosted(run: str, name: str, names: list[str], options: Serve) -> "server.Hosted":
    """Loads a model, and starts what draws its texts."""
    from jaxgpt.generation import api, server
    from jaxgpt.generation.worker import Worker

    trained = loading.load(run, devices=1)
    tokenizer = trained.tokenizer
    model = only_known_tokens(trained.config.model, tokenizer)
    template = _template(options.template, trained.about.get("template"))
    decoder = Decoder(trained.params, model, trained.config.compute, slots=options.slots, capacity=model.context)
    limits = api.Limits(model.context, min(options.max_tokens, model.context), options.texts)
    others = tuple(other for other in names if other != name)
    served = api.Served(name, tokenizer, model.vocabulary_size, limits, others)
    return server.Hosted(Worker(ContinuousBatch(decoder, tokenizer)), served, template)


def _template(named: str, trained: dict[str, Any] | None) -> Template:
    """Returns the built-in template of this name, the Jinja template in a file, or the one that the model was trained
    with. UserError where there is no such file.
    """
    if not named:
        return chat_templates.from_state(trained) if trained else chat_templates.built_in("chatml")
    if named in chat_templates.NAMES:
        return chat_templates.built_in(named)
    try:
        return Template("jinja", files.read_text(Path(named), chat_templates.LARGEST_TEMPLATE))
    except UserError as error:
        raise UserError(f"--template {error}; {', '.join(chat_templates.NAMES)} are built in") from None


def _tell(names: list[str], listening: socket.socket, key: str, connections: int) -> None:
    """Prints the models' names, the server's address, and the limit `connections` where it is lower than was asked for,
    and not 0.
    """
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    needed = "an API key is needed" if key else "no API key"
    say(f"serving   {shown(', '.join(names))} at {address} ({needed})", flush=True)
    if connections:
        say(f"limit     {connections} connections at once, by the limit of open files (ulimit -n)", flush=True)
    say(f"page      {address.removesuffix('v1')} to talk to it; Ctrl-C ends it", flush=True)


def _key(options: Serve) -> str:
    """Returns the API key; empty where there is none. UserError for a key that no header can have."""
    if options.key_file:
        where = f"--key-file {shown(options.key_file)}"
        try:
            key = files.read_text(Path(options.key_file), LARGEST_KEY).strip()
        except UserError as error:
            raise UserError(f"--key-file {error}") from None
        if not key:
            raise UserError(f"{where}: there is no key in it")
    else:
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
    if len(key) > LARGEST_KEY:
        raise UserError(f"{where}: the key is longer than {LARGEST_KEY} characters, and no header could have it")
    unsendable = next((i for i, character in enumerate(key) if not " " <= character <= "~"), None)
    if unsendable is not None:
        raise UserError(
            f"{where}: the key has a character that can't be sent in a header, U+{ord(key[unsendable]):04X} at "
            f"position {unsendable}: take ASCII letters and digits, on one line"
        )
    return key


def _resolve(host: str, port: int) -> tuple[int, tuple]:
    """Returns the address family and the address to listen on. UserError where there is no such address."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, and must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return family, address
    except (OSError, ValueError) as error:  # ValueError: a name that can't be one
        raise UserError(
            f"--host {shown(host)}: there is no such address ({reason(error)}). 127.0.0.1 is this machine alone, "
            "0.0.0.0 all of its addresses"
        ) from None


def _listen(options: Serve, family: int, address: tuple) -> socket.socket:
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise UserError(
            f"--host {shown(options.host)} --port {options.port}: can't listen there ({reason(error)}). "
            "Another --port may be free; 0 takes one that is"
        ) from None
