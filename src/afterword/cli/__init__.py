"""The command line. Sees all rooms; what a command does is imported when it is run."""

from afterword.cli.commands import main

__all__ = ["main"]
