"""Other projects' files: Hugging Face's folders and llm.c's binaries, read and written. docs/formats.md lists them."""
