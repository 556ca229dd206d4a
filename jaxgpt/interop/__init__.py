"""Reads and writes other projects' files: Hugging Face's folders and llm.c's binaries. docs/formats.md lists them."""
