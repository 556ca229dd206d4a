"""Text, tokenizers, token files and the loader."""
