"""The command line. It may import every package; a command's implementation is imported when the command runs."""

from afterword.cli.commands import main

__all__ = ["main"]
