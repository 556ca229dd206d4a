"""GPT-2 in JAX with every gradient derived by hand."""

__version__ = "0.1.0"
