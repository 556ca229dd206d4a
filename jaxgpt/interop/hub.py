"""Downloads models of the Hugging Face hub by name: config.json, safetensors and tokenizer files, never a pickle."""

import re
from pathlib import Path

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface, huggingface_tokenizer

NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")  # NAME, OWNER/NAME, and @REVISION
FILES = [huggingface.CONFIG, huggingface.WEIGHTS, huggingface.INDEX, *huggingface_tokenizer.FILES]


def fetch(name: str) -> Path:
    """Downloads a model's files, unless they are in the hub's cache, and returns their folder there.

    Args:
        name: NAME or OWNER/NAME, with @REVISION behind it or not.

    Raises:
        UserError: The extra `hub` is missing, or the hub has no such model or can't be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: there is no such file or folder, and to look for it on the Hugging Face hub the package "
            "huggingface-hub is needed: make env EXTRAS=hub"
        ) from None
    match = NAME.fullmatch(name)
    assert match, name
    repository, revision = match.groups()

    def download(names: list[str]) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=names))
        except Exception as error:  # of many types: the package's, httpx's, the operating system's
            message = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: there is no such file or folder here, and from the Hugging Face hub it can't be had ({message})"
        )

    folder = download(FILES)
    if (folder / huggingface.WEIGHTS).exists():
        return folder
    if not (folder / huggingface.INDEX).exists():
        raise UserError(
            f"{name}: on the Hugging Face hub this model has no safetensors. Pickles (.bin) can run code and are not "
            "read: load it with transformers and save it again, which writes safetensors"
        )
    index = files.read_json(folder / huggingface.INDEX, within=huggingface_tokenizer.root(folder))
    return download([*FILES, *huggingface.shard_names(index, folder)])
