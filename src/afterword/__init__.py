"""Afterword: OpenAI's text Completions API on models that people run themselves."""

__version__ = "0.1.0"
