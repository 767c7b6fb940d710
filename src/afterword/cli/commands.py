"""The command line: commands and their options, and no more, so that --help and completion start fast.

What the commands do is imported when they do it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from afterword import __version__
from afterword.cli import batch, config, keys, settings, shell_completion
from afterword.cli.options import GroupedCommand, engine_options, leaves, option, short_values, typed
from afterword.errors import AfterwordError, RequestError, SettingError
from afterword.settings.durations import parse_duration

SECONDS = click.FloatRange(0, 86_400)


class _Commands(click.Group):
    """Our errors are sentences, not tracebacks. Its commands' options get what sets and shows them."""

    command_class = GroupedCommand

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        for words, each in leaves(cmd, name or cmd.name or ""):
            short_values(each)
            settings.with_variables(each, words)
            settings.with_file(each)
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AfterwordError as error:
            click.secho(f"afterword: {error.message}", err=True, fg="red")
            ctx.exit(2 if isinstance(error, SettingError | RequestError) else 1)
        except KeyboardInterrupt:
            ctx.exit(130)  # as shells count: 128 and the signal's number
        except BrokenPipeError:  # whoever read standard output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
            ctx.exit(141)


@click.group(cls=_Commands, context_settings={"show_default": True})
@click.version_option(__version__, prog_name="afterword")
def main() -> None:
    """OpenAI's text Completions API on models that you run yourself.

    An option that is not on the command line is looked for in the environment (--port of serve is
    AFTERWORD_SERVE_PORT), then in a settings file ([serve] port = 9000). `afterword config` shows what is set where.

    \b
    Examples:
      afterword serve                            # the built-in model
      afterword pull hf:owner/repo:Q8_0          # another one, from the Hub
      afterword complete "The sea was"           # without a server

    Exit status: 0 done, 1 failed while it ran, 2 a setting or a model that cannot be used, 75 a batch that can go on
    later, 130 Ctrl-C.
    """


@main.command()
@click.argument(
    "models",
    metavar="[MODEL]...",
    nargs=-1,
    envvar="AFTERWORD_SERVE_MODELS",
    shell_complete=shell_completion.complete_model,
)
@option("Model", "--alias", multiple=True, help="A model's name in requests; for several in their order.")
@option(
    "Model",
    "--keep-alive",
    type=parse_duration,
    metavar="TIME",
    help="Load a model when asked for it, unload it when unused for so long (300, 5m, 1h).  [default: forever]",
)
@option("Model", "--plain-text", is_flag=True, help="Text that spells a special token is plain text.")
@option("Network", "--host", default="127.0.0.1", help="Address to listen on.")
@option("Network", "--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@option("Network", "--allowed-host", multiple=True, help="A name that the server answers to; * for any; repeatable.")
@option("Network", "--cors-origin", multiple=True, help="A web page's origin that may use the server; repeatable.")
@option(
    "Network", "--proxy", multiple=True, help="Address of a reverse proxy, which says for whom it asks; repeatable."
)
@option(
    "Access",
    "--api-key",
    multiple=True,
    envvar="AFTERWORD_API_KEY",
    help="A key that opens the server; repeatable.",
)
@option("Access", "--api-key-file", type=click.Path(path_type=Path), help="A file with a key a line.")
@option("Access", "--keys", is_flag=True, help="Let in who has a key of afterword keys create.")
@option("Access", "--keys-file", type=click.Path(path_type=Path), envvar=keys.KEYS_FILE, help="Keys kept elsewhere.")
@option(
    "Access", "--wrong-keys", type=click.IntRange(min=0), default=20, help="Most a minute from one address; 0: any."
)
@option("Access", "--shared-cache", is_flag=True, help="Use what was computed for one key for others too.")
@option("Access", "--allow-open", is_flag=True, help="Listen beyond this machine without any key.")
@option("Limits", "--max-queue", type=click.IntRange(min=1), default=4096, help="Most prompts that wait.")
@option(
    "Limits",
    "--max-logprobs",
    type=click.IntRange(0, 1000),
    help="Most alternatives a token.  [default: 20; with --strict 5]",
)
@option("Limits", "--max-stop", type=click.IntRange(min=1), help="Most stop strings.  [default: 16; with --strict 4]")
@option("Limits", "--limit", multiple=True, help="NAME=NUMBER of the limits that --print-limits lists; repeatable.")
@option("Limits", "--print-limits", is_flag=True, help="List the limits and what they are, and do no more.")
@option("Limits", "--json", "as_json", is_flag=True, help="Have --print-limits list them as JSON.")
@option("API", "--strict", is_flag=True, help="Refuse what OpenAI refuses; its limits, no extension fields.")
@option(
    "API",
    "--ignore-unknown",
    is_flag=True,
    help="Accept unknown fields; the header x-afterword-ignored lists them. Lengths by another name stay refused.",
)
@engine_options
@option(
    "Process",
    "--batch-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where uploaded files and batches are kept.  [default: afterword/batches in $XDG_DATA_HOME or ~/.local/share]",
)
@option(
    "Process", "--log", type=click.Path(path_type=Path), help="Add a line of JSON a request to a file; - is stderr."
)
@option("Process", "--metrics-prefix", default="afterword", help="What names in /metrics begin with, such as vllm.")
@option("Process", "--metrics-open", is_flag=True, help="Let /metrics be read without a key.")
@option("Process", "--traces", is_flag=True, help="Tell an OpenTelemetry collector of each request (OTEL_* say where).")
@option(
    "Process", "--drain-delay", type=SECONDS, default=0.0, help="Seconds to go on after SIGTERM, for a load balancer."
)
@option("Process", "--grace", type=SECONDS, default=30.0, help="Seconds that answers have to end when the server does.")
def serve(models: tuple[str, ...], **options: Any) -> None:
    """Serve models to any client of OpenAI's API.

    MODEL is a GGUF file, hf:owner/repo[:file or quant], or nothing for the built-in model. With several,
    requests choose one by its name.

    \b
    Examples:
      afterword serve                            # the built-in model
      afterword serve model.gguf --port 9000     # a file
      afterword serve hf:owner/repo:Q8_0         # what afterword pull has got
      afterword serve a.gguf b.gguf              # two models
      afterword serve --host 0.0.0.0 --keys      # for others, who need a key
      afterword serve --print-limits             # what one request may ask for
    """
    from afterword.cli import run

    run.serve(models, options)


@main.command()
@click.argument("prompt")
@option(
    "Model",
    "--model",
    shell_complete=shell_completion.complete_model,
    help="As for serve; with --url its name there.",
)
@option("Server", "--url", help="Ask this server instead of running a model.")
@option("Server", "--api-key", envvar="OPENAI_API_KEY", help="The key that opens it.")
@option("Answer", "--suffix", help="Text after the gap to fill.")
@option("Answer", "--max-tokens", type=int, default=128, help="Most tokens to write.")
@option("Answer", "--temperature", type=float, default=1.0, help="0 always takes the likeliest token.")
@option("Answer", "--top-p", type=float, default=1.0, help="Draw from the likeliest tokens with this much mass.")
@option("Answer", "--seed", type=int, help="The same seed gives the same text.")
@option("Answer", "--stop", multiple=True, help="Text to stop before; repeatable.")
@option("Answer", "--echo", is_flag=True, help="Print the prompt too.")
@option("Answer", "--json", "as_json", is_flag=True, help="Print the whole answer as the API gives it.")
@engine_options
def complete(prompt: str, model: str | None, url: str | None, api_key: str | None, **options: Any) -> None:
    """Continue a text in the terminal.

    PROMPT is the text; - reads it from standard input. Standard output gets what follows it and nothing else.

    \b
    Examples:
      afterword complete "The sea was" --max-tokens 40
      afterword complete "def add(a, b):" --suffix "    return c"
      cat story.txt | afterword complete - --seed 1 > more.txt
      afterword complete "One day" --url http://127.0.0.1:8000
      afterword complete "One, two," --json      # as the API answers
    """
    from afterword.cli import run

    for each in typed("Engine") if url else typed("Server"):
        raise SettingError(f"{each} {'is for a model that runs here, not for' if url else 'goes with'} --url.")
    run.complete(prompt, model, options, (url, api_key) if url else None)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, with paths.")
def models(as_json: bool) -> None:
    """List the models on this machine.

    By the names that serve and complete know them by. They are the built-in one, those that pull has got, and those
    of Ollama and LM Studio.

    \b
    Examples:
      afterword models
      afterword models --json
    """
    from afterword.cli.models import list_models

    list_models(as_json)


@main.command()
@click.argument("spec")
@click.option("--json", "as_json", is_flag=True, help="Tell only what came of it, as JSON.")
def pull(spec: str, as_json: bool) -> None:
    """Download a model from the Hub, or the rest of one.

    SPEC is hf:owner/repo, hf:owner/repo:Q4_K_M or hf:owner/repo:file.gguf.

    \b
    Examples:
      afterword pull hf:owner/repo               # the best-suited file
      afterword pull hf:owner/repo:Q4_K_M        # its file of this type
    """
    from afterword.cli.models import pull as download

    download(spec, as_json)


main.add_command(batch.batch)
main.add_command(keys.keys)
main.add_command(keys.usage)
main.add_command(config.config)
main.add_command(shell_completion.completion)
