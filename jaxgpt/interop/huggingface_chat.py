"""The chat template of a Hugging Face tokenizer: chat_template.jinja, or in tokenizer_config.json."""

from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.data import chat_templates
from jaxgpt.data.chat_templates import LARGEST_TEMPLATE, Template
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop.huggingface_tokenizer import CONFIG, LARGEST_CONFIG, SPECIAL, root

FILE = "chat_template.jinja"
VARIABLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def named(name: str) -> Template:
    """Returns a built-in template by its name, or the one of a Hugging Face folder or of a .jinja file.

    UserError where it is none of these.
    """
    if name in chat_templates.NAMES:
        return chat_templates.built_in(name)
    path = Path(name)
    if name and path.is_file():
        return template_of(path.parent, path) or _none(name)
    return (name and template_of(path)) or _none(name)


def template_of(folder: Path, file: Path | None = None) -> Template | None:
    """Returns the template of a folder, or of a file beside a tokenizer's others; None where there is none.

    UserError where a file of it is damaged.
    """
    if not folder.is_dir():
        return None
    config, special = (_config(folder, name) for name in (CONFIG, SPECIAL))
    if file or (folder / FILE).exists():
        source = files.read_text(file or folder / FILE, LARGEST_TEMPLATE, None if file else root(folder))
    else:
        source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        by_default = (one for one in source if isinstance(one, dict) and one.get("name") == "default")
        source = next(by_default, {}).get("template")
    if source is None:
        return None
    if not isinstance(source, str) or not source:
        raise UserError(f"{shown(folder / CONFIG)}: its chat_template is {shown(source)}, and no text")
    variables = {name: text for name in VARIABLES if (text := _text(special.get(name)) or _text(config.get(name)))}
    return chat_templates.from_state({"name": "jinja", "source": source, "variables": variables})


def _none(name: str) -> Template:
    raise UserError(
        f"--template {shown(name)}: name one of {', '.join(chat_templates.NAMES)}, a Hugging Face folder whose "
        f"tokenizer has a chat template, or a {FILE}"
    )


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return files.read_json(path, LARGEST_CONFIG, root(folder)) if path.exists() else {}
