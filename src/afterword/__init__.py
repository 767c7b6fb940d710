"""Afterword: a server for OpenAI's text Completions API on local GGUF models."""

__version__ = "0.1.0"
