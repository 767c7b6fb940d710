"""Run Afterword's command line with `python -m afterword`."""

from afterword.cli import main

main()
