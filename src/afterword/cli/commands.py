"""Declares the commands and their options. The implementation of a command is imported when the command runs.

So `--help` and shell completion start fast. This module must not import the web framework, llama.cpp or numpy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from afterword import __version__
from afterword.cli import batch, config, deploy, keys, settings, shell_completion
from afterword.cli.options import GroupedCommand, ServeCommand, engine_options, leaves, option, short_values, typed
from afterword.errors import AfterwordError, RequestError, SettingError
from afterword.settings.durations import parse_duration

SECONDS = click.FloatRange(0, 86_400)


class _Commands(click.Group):
    """The group of all commands. It prints Afterword's errors as one line and maps them to exit statuses.

    Every added command gets environment variables for its options, the option `--config` and short value names.
    """

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
            ctx.exit(130)  # 128 and the number of SIGINT, as in shells
        except BrokenPipeError:  # the reader closed standard output, as `| head` does
            # Without a valid standard output Python would report the error again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(141)


@click.group(cls=_Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="afterword")
def main() -> None:
    """Serve OpenAI's text Completions API with models on your own machine.

    An option is read from the command line, else from the environment (--port of serve is AFTERWORD_SERVE_PORT),
    else from a settings file ([serve] port = 9000). `afterword config` shows all settings and their sources.

    \b
    Examples:
      afterword serve                            # the built-in model
      afterword pull hf:owner/repo:Q8_0          # download a model
      afterword complete "The sea was"           # without a server

    Exit status: 0 success, 1 failure at run time, 2 invalid setting, request or model, 75 a batch that can be
    continued, 130 Ctrl-C.
    """


@main.command(cls=ServeCommand)
@click.argument(
    "models",
    metavar="[MODEL]...",
    nargs=-1,
    envvar="AFTERWORD_SERVE_MODELS",
    shell_complete=shell_completion.complete_model,
)
@option(
    "Model",
    "--lora",
    multiple=True,
    metavar="NAME=FILE[@SCALE]",
    help="Serve the model with a LoRA adapter (GGUF) under another name; repeatable.",
)
@option("Model", "--alias", multiple=True, help="Name of a model in requests; repeatable, in the order of MODEL.")
@option(
    "Model",
    "--keep-alive",
    type=parse_duration,
    metavar="TIME",
    help="Load a model on request, unload it when unused for this time (300, 5m, 1h).  [default: forever]",
)
@option("Model", "--plain-text", is_flag=True, help="Treat special tokens in prompts as plain text.")
@option(
    "Model",
    "--defaults",
    type=click.Path(path_type=Path),
    help="TOML file with default field values for models, and further names of them.",
)
@option(
    "Model",
    "--infill-fallback",
    type=click.Choice(["rerank"]),
    help="How models without infill tokens fill gaps.  [default: not at all]",
)
@option("Model", "--infill-trim", is_flag=True, help="Shorten infill prompts that are too long for the context.")
@option(
    "Model",
    "--bos-before-ids",
    is_flag=True,
    help="Begin prompts of token ids with BOS where the model needs it and they lack it, as for lm-eval.",
)
@option("Network", "--host", default="127.0.0.1", help="Address to listen on.")
@option("Network", "--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@option("Network", "--allowed-host", multiple=True, help="A name allowed in the Host header; * for any; repeatable.")
@option("Network", "--cors-origin", multiple=True, help="Origin of a web page that may use the server; repeatable.")
@option("Network", "--proxy", multiple=True, help="Address of a reverse proxy that sets X-Forwarded-For; repeatable.")
@option(
    "Access",
    "--api-key",
    multiple=True,
    envvar="AFTERWORD_API_KEY",
    help="An API key that clients may use; repeatable.",
)
@option("Access", "--api-key-file", type=click.Path(path_type=Path), help="A file with one API key per line.")
@option("Access", "--keys", is_flag=True, help="Accept API keys made with afterword keys create.")
@option(
    "Access",
    "--keys-file",
    type=click.Path(path_type=Path),
    envvar=keys.KEYS_FILE,
    help="File of these keys, if not the default one.",
)
@option(
    "Access",
    "--wrong-keys",
    type=click.IntRange(min=0),
    default=20,
    help="Most wrong API keys per minute and address; 0: no limit.",
)
@option(
    "Access",
    "--lora-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder whose LoRA adapters clients may load while the server runs.",
)
@option("Access", "--lora-key", multiple=True, help="ID of an API key that may load and unload them; repeatable.")
@option("Access", "--shared-cache", is_flag=True, help="Share the prefix cache between API keys.")
@option("Access", "--allow-open", is_flag=True, help="Allow a public --host without API keys.")
@option("Limits", "--max-queue", type=click.IntRange(min=1), default=4096, help="Most waiting prompts.")
@option(
    "Limits",
    "--max-logprobs",
    type=click.IntRange(min=-1),
    help="Most alternatives per token; -1: no limit.  [default: 20; with --strict 5]",
)
@option(
    "Limits",
    "--max-stop",
    type=click.IntRange(min=1),
    help="Most stop strings per request.  [default: 16; with --strict 4]",
)
@option("Limits", "--limit", multiple=True, help="NAME=NUMBER, a limit that --print-limits lists; repeatable.")
@option("Limits", "--print-limits", is_flag=True, help="Print all limits with their meanings, and exit.")
@option("Limits", "--json", "as_json", is_flag=True, help="With --print-limits: print JSON.")
@option("API", "--strict", is_flag=True, help="Apply OpenAI's limits and refuse extension fields.")
@option(
    "API",
    "--ignore-unknown",
    is_flag=True,
    help="Accept unknown fields; header x-afterword-ignored lists them. Other names of max_tokens are still refused.",
)
@option(
    "Engine",
    "--engine",
    type=click.Choice(["llama", "vllm", "http"]),
    default="llama",
    help="What runs models; http: the vLLM server at --upstream.",
)
@option("Engine", "--vllm-python", metavar="FILE", help="Python of an environment with vLLM; see docs/vllm.md.")
@option("Engine", "--vllm-flags", default="", help="vLLM's own flags; on the command line also after --.")
@option("Engine", "--upstream", metavar="URL", help="A vLLM server that runs the model; see docs/vllm.md.")
@option(
    "Engine",
    "--upstream-key-file",
    type=click.Path(path_type=Path),
    help="File with the API key that the upstream expects.",
)
@engine_options
@option(
    "Engine",
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep prefixes in this folder, so that they survive a restart.  [default: in memory only]",
)
@option(
    "Engine",
    "--cache-size",
    type=click.FloatRange(min=0.001, max=1_000_000),
    default=10.0,
    help="Most gigabytes in --cache-dir.",
)
@option(
    "Process",
    "--batch-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of uploaded files and batches.  [default: afterword/batches in $XDG_DATA_HOME or ~/.local/share]",
)
@option(
    "Process", "--log", type=click.Path(path_type=Path), help="Append one JSON line per request to a file; - is stderr."
)
@option("Process", "--metrics-prefix", default="afterword", help="Prefix of the names in /metrics, such as vllm.")
@option(
    "Process", "--metrics-underscores", is_flag=True, help="Write names in /metrics with _ in place of :, for promtool."
)
@option(
    "Process",
    "--metrics-keys",
    type=click.IntRange(0, 10000),
    default=0,
    metavar="N",
    help="Count the requests and tokens of up to N API keys apart in /metrics.",
)
@option("Process", "--metrics-open", is_flag=True, help="Serve /metrics without an API key.")
@option("Process", "--traces", is_flag=True, help="Send traces to an OpenTelemetry collector (see OTEL_* variables).")
@option(
    "Process",
    "--drain-delay",
    type=SECONDS,
    default=0.0,
    help="Seconds to accept requests after SIGTERM, for load balancers.",
)
@option(
    "Process", "--grace", type=SECONDS, default=30.0, help="Seconds that running responses have to end at shutdown."
)
def serve(models: tuple[str, ...], **options: Any) -> None:
    """Serve models to clients of OpenAI's API.

    MODEL is a GGUF file or hf:owner/repo[:file or quant]; without MODEL the built-in model is served. With --engine
    vllm or http it is a folder. A request selects one of several models by its name.

    \b
    Examples:
      afterword serve                            # the built-in model
      afterword serve model.gguf --port 9000     # a file
      afterword serve hf:owner/repo:Q8_0         # a model from afterword pull
      afterword serve a.gguf b.gguf              # two models
      afterword serve --host 0.0.0.0 --keys      # public, with API keys
      afterword serve --print-limits             # the limits of requests
      afterword serve DIR --engine vllm          # by vLLM, see docs/vllm.md
    """
    from afterword.cli import run

    run.serve(models, options)


@main.command()
@click.argument("prompt")
@option(
    "Model",
    "--model",
    shell_complete=shell_completion.complete_model,
    help="A model, as for serve; with --url its name on the server.",
)
@option("Server", "--url", help="Send the request to this server instead of running a model.")
@option("Server", "--api-key", envvar="OPENAI_API_KEY", help="API key for this server.")
@option("Generation", "--suffix", help="Text after the gap to fill.")
@option("Generation", "--max-tokens", type=int, default=128, help="Most tokens to generate.")
@option("Generation", "--temperature", type=float, default=1.0, help="0 always selects the most likely token.")
@option(
    "Generation",
    "--top-p",
    type=float,
    default=1.0,
    help="Sample from the most likely tokens with this total probability.",
)
@option("Generation", "--seed", type=int, help="The same seed gives the same text.")
@option("Generation", "--stop", multiple=True, help="Stop string; repeatable.")
@option("Generation", "--echo", is_flag=True, help="Print the prompt too.")
@option("Generation", "--json", "as_json", is_flag=True, help="Print the response of the API as JSON.")
@engine_options
def complete(prompt: str, model: str | None, url: str | None, api_key: str | None, **options: Any) -> None:
    """Continue a text in the terminal.

    PROMPT is the text, or - to read it from standard input. Only the continuation goes to standard output.

    \b
    Examples:
      afterword complete "The sea was" --max-tokens 40
      afterword complete "def add(a, b):" --suffix "    return c"
      cat story.txt | afterword complete - --seed 1 > more.txt
      afterword complete "One day" --url http://127.0.0.1:8000
      afterword complete "One, two," --json      # the API's response
    """
    from afterword.cli import run

    for each in typed("Engine") if url else typed("Server"):
        raise SettingError(f"{each} cannot be used {'with' if url else 'without'} --url.")
    run.complete(prompt, model, options, (url, api_key) if url else None)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with paths.")
def models(as_json: bool) -> None:
    """List the models on this machine.

    Shows the names for serve and complete. The models are the built-in one, those that pull downloaded, and those of
    Ollama and LM Studio.

    \b
    Examples:
      afterword models
      afterword models --json
    """
    from afterword.cli.models import list_models

    list_models(as_json)


@main.command()
@click.argument("spec")
@click.option("--json", "as_json", is_flag=True, help="Print only the result, as JSON.")
def pull(spec: str, as_json: bool) -> None:
    """Download a model from the Hub, or continue a download.

    SPEC is hf:owner/repo, hf:owner/repo:Q4_K_M or hf:owner/repo:file.gguf.

    \b
    Examples:
      afterword pull hf:owner/repo               # the best-suited file
      afterword pull hf:owner/repo:Q4_K_M        # the file of this type
    """
    from afterword.cli.models import pull as download

    download(spec, as_json)


@main.command()
@click.argument("spec", shell_complete=shell_completion.complete_model)
def rm(spec: str) -> None:
    """Remove a model that pull downloaded from this machine.

    SPEC is hf:owner/repo:Q4_K_M or hf:owner/repo:file.gguf, as afterword models lists it. This cannot be undone.

    \b
    Examples:
      afterword rm hf:owner/repo:Q4_K_M
    """
    from afterword.cli.models import rm as remove

    remove(spec)


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", help="Address of the server.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="API key for this server.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ps(url: str, api_key: str | None, as_json: bool) -> None:
    """List the models of a running server, with their state and load.

    The load of each model is shown only by servers without API keys.

    \b
    Examples:
      afterword ps
      afterword ps --url http://127.0.0.1:9000 --json
    """
    from afterword.cli.server_status import print_status

    print_status(url, api_key, as_json)


main.add_command(batch.batch)
main.add_command(deploy.deploy)
main.add_command(keys.keys)
main.add_command(keys.usage)
main.add_command(config.config)
main.add_command(shell_completion.completion)
