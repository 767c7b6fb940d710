"""The options of `afterword batch`. `cli/batch_run.py` implements the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from afterword.cli.options import GroupedCommand, engine_options, option
from afterword.cli.shell_completion import complete_model

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=GroupedCommand)
@click.argument("source", type=_FILE, metavar="IN.jsonl")
@click.argument("model", required=False, shell_complete=complete_model)
@option("Job", "-o", "--output", type=_FILE, help="Output file. A journal is beside it until it is complete.")
@option(
    "Job",
    "--concurrency",
    type=click.IntRange(1, 4096),
    help="Requests at the same time.  [default: twice the sequences]",
)
@option("Job", "--plan", is_flag=True, help="Only estimate tokens and time.")
@option("Job", "--restart", is_flag=True, help="Delete the journal and the output, and start again.")
@option("Job", "--json", "as_json", is_flag=True, help="Print the result as JSON.")
@option("Server", "--url", help="Send requests to this server instead of running a model.")
@option("Server", "--api-key", envvar=["AFTERWORD_BATCH_API_KEY", "OPENAI_API_KEY"], help="API key for this server.")
@option("Model", "--alias", help="Name of the model in requests.  [default: from the file]")
@engine_options
def batch(source: Path, model: str | None, **options: Any) -> None:
    """Answer every request of a file.

    MODEL (as for serve) or the server at --url answers. Each line is the body of a request, or OpenAI's batch form.
    The output has the order of the input; a line without an answer has an error. After a stop or a crash the same
    command continues the batch, and the output has the same bytes as without the interruption.

    \b
    Examples:
      afterword batch in.jsonl -o out.jsonl             # the built-in model
      afterword batch in.jsonl -o out.jsonl hf:owner/repo:Q8_0
      afterword batch in.jsonl -o out.jsonl --url http://127.0.0.1:8000
      afterword batch in.jsonl --plan
    """
    from afterword.cli import batch_run

    click.get_current_context().exit(batch_run.batch(source, model, options))
