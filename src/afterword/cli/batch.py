"""`afterword batch`: its options. What it does is in `cli/batch_run.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from afterword.cli.options import GroupedCommand, engine_options, option
from afterword.cli.shell_completion import complete_model

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=GroupedCommand)
@click.argument("rows", type=_FILE, metavar="IN.jsonl")
@click.argument("model", required=False, shell_complete=complete_model)
@option("Job", "-o", "--output", type=_FILE, help="Where the answers go; a journal stands beside it until then.")
@option("Job", "--concurrency", type=click.IntRange(1, 4096), help="Rows at a time.  [default: twice the sequences]")
@option("Job", "--plan", is_flag=True, help="Only say how many tokens and how much time it would take.")
@option("Job", "--restart", is_flag=True, help="Forget what is done, and the output that is there.")
@option("Job", "--json", "as_json", is_flag=True, help="Print what came out as JSON.")
@option("Server", "--url", help="Ask this server instead of running a model.")
@option("Server", "--api-key", envvar=["AFTERWORD_BATCH_API_KEY", "OPENAI_API_KEY"], help="The key that opens it.")
@option("Model", "--alias", help="Name of the model in rows.  [default: from the file]")
@engine_options
def batch(rows: Path, model: str | None, **options: Any) -> None:
    """Answer every row of a file.

    With MODEL (as for serve) or with the server at --url. A row is a request, or one in OpenAI's batch form.
    Answers come in the order of the rows, those that cannot be had as errors. Stopped or killed, the same command
    goes on where it was, and the output is the same to the byte.

    \b
    Examples:
      afterword batch in.jsonl -o out.jsonl             # the built-in model
      afterword batch in.jsonl -o out.jsonl hf:owner/repo:Q8_0
      afterword batch in.jsonl -o out.jsonl --url http://127.0.0.1:8000
      afterword batch in.jsonl --plan
    """
    from afterword.cli import batch_run

    click.get_current_context().exit(batch_run.batch(rows, model, options))
