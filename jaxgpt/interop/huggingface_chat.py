"""Reads and writes the chat template of a Hugging Face tokenizer: chat_template.jinja, or in tokenizer_config.json.

Built-in templates are written as Jinja, so that transformers' `apply_chat_template` gives the text that the model was
trained with.
"""

import json
from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.data import chat_templates
from jaxgpt.data.chat_templates import LARGEST_TEMPLATE, Template
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, shown
from jaxgpt.interop.huggingface_tokenizer import CONFIG, SPECIAL, read_config, root

FILE = "chat_template.jinja"
VARIABLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


# Each as chat_templates.py has it. White space between the parts is no text.
CHATML = r"""{%- for message in messages -%}
    {%- set role = 'user' if message.role == 'tool' else message.role -%}
    {%- set content = message.content or '' -%}
    {%- set content = '<tool_response>\n' + content + '\n</tool_response>' if message.role == 'tool' else content -%}
    {%- set said = namespace(text=content) -%}
    {%- for one in message.tool_calls or [] -%}
        {%- set call = one.function or one -%}
        {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
        {%- set call = '{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments + '}' -%}
        {%- set before = '\n' if content or not loop.first else '' -%}
        {%- set said.text = said.text + before + '<tool_call>\n' + call + '\n</tool_call>' -%}
    {%- endfor -%}
    {{- '<|im_start|>' + role + '\n' -}}
    {%- if role == 'assistant' -%}
        {%- generation -%}{{- said.text + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
    {%- else -%}
        {{- said.text + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
LLAMA3 = r"""{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' or message.tool_calls -%}
        {{- raise_exception('this chat template has no place for a tool\'s calls') -}}
    {%- endif -%}
    {%- set content = (message.content or '') | trim + '<|eot_id|>' -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- content -}}{%- endgeneration -%}
    {%- else -%}
        {{- content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
MISTRAL = r"""{{- '<s>' -}}
{%- set system = (messages[0].content or '') + '\n\n' if messages and messages[0].role == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') or message.tool_calls -%}
        {{- raise_exception('this chat template takes questions and answers in turn, and a system message first') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- '[INST] ' + (system if loop.first else '') + (message.content or '') + '[/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + (message.content or '') | trim + '</s>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
BUILT_IN = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}


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
    config, special = (read_config(folder, name) for name in (CONFIG, SPECIAL))
    if file or (folder / FILE).exists():
        source = files.read_text(file or folder / FILE, LARGEST_TEMPLATE, None if file else root(folder))
    else:
        source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        by_default = (one for one in source if isinstance(one, dict) and one.get("name") == "default")
        source = next(by_default, {}).get("template")
    if source is None or source == "":
        return None
    if not isinstance(source, str):
        raise UserError(f"{shown(folder / CONFIG)}: its chat_template is {shown(source)}, and no text")
    variables = {name: text for name in VARIABLES if (text := _text(special.get(name)) or _text(config.get(name)))}
    return chat_templates.from_state({"name": "jinja", "source": source, "variables": variables})


def source_of(template: Template, contents: dict[str, str]) -> str:
    """Returns a template as Jinja, for a tokenizer whose other files have these contents.

    The special tokens that a Jinja template names are set in it where those files don't name the same.
    """
    if template.name != "jinja":
        return BUILT_IN[template.name]
    config = parse_json(contents[CONFIG])
    other = {name: text for name, text in template.variables.items() if name in template.source}
    other = {name: text for name, text in other.items() if config.get(name) != text}
    return (
        "".join(f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n" for name, text in other.items())
        + template.source
    )


def end_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens at which an answer ends, for generation_config.json; none where text ends it."""
    token = chat_templates.end_token(template, tokenizer)
    found = (tokenizer.end_of_text, token) if token is not None else ()
    return [*dict.fromkeys(number for number in found if number is not None)]


def _none(name: str) -> Template:
    raise UserError(
        f"--template {shown(name)}: name one of {', '.join(chat_templates.NAMES)}, a Hugging Face folder whose "
        f"tokenizer has a chat template, or a {FILE}"
    )


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
