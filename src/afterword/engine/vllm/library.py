"""The only module that imports vLLM: loads a model, runs requests, and describes what changes numbers.

vLLM's Python interface is not stable. What is used here is that of vLLM 0.32; `open_model` refuses older versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from afterword.engine import messages
from afterword.engine.llama.model_files import ModelFiles
from afterword.engine.protocol import ModelInfo
from afterword.engine.vllm.model_folder import ModelFolder, read_folder
from afterword.engine.vllm.requests import LIMITS, Alternatives, PromptScore, SampleOutput, SampleRequest
from afterword.engine.vllm.tokenizer import FolderTokenizer
from afterword.engine.vllm.versions import OLDEST_TEXT, is_too_old
from afterword.errors import SettingError

_OTHER_PYTHON = "Another interpreter can be named with --vllm-python."
_FLAGS = ("--max-logprobs=-1", "--disable-log-stats", "--generation-config=vllm")
_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # each process imports `bootstrap`, which ends it with its parent
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",  # the model is a folder
}
# Names of environment variables that change no number.
_NOT_NUMBERS = re.compile(
    r"_(PORT|HOST|IP|PATH|DIR|CACHE_ROOT|PREFIX|STATS|TIMEOUT\w*|LOGGING\w*)$|_LOGGING_|LOG_LEVEL"
)


@dataclass(frozen=True, slots=True)
class LoadedVllm:
    """A loaded model. `death`: the exception that requests raise when vLLM's processes have ended."""

    llm: Any
    model_info: ModelInfo
    tokenizer: FolderTokenizer
    batch_tokens: int
    death: type[Exception]

    async def generate(self, request: SampleRequest, take: Callable[[SampleOutput], bool]) -> None:
        """Run a request; see `jobs.Generate`. `take`: see `jobs.SampleSink`."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        prompt = tokens_input(list(request.prompt), cache_salt=request.cache_salt or None)
        # made for this request alone, so that vLLM need not copy every object in them
        parameters = _parameters()(**request.fields, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        collector = Collector(request.prompt, take)
        try:
            theirs = await self.llm.add_request(request.name, prompt, parameters)
            collector.replace(theirs)
            state = self.llm.output_processor.request_states.get(theirs.request_id)
            if state is not None and request.reads_only_ids:
                collector.take_ids_of(state)
            await collector.ended
        finally:
            if not collector.finished:  # vLLM itself forgets requests whose sending has failed or was cancelled
                await self.llm.abort(request.name)

    async def ping(self) -> None:
        """Return when vLLM's main process has answered, which it does between two forward passes."""
        await self.llm.is_sleeping()


class Collector:
    """Takes the outputs of a request directly from vLLM, where its own collector would wake a task for each token.

    `ended`: set when no more outputs are wanted, with the exception if there is one. `finished`: vLLM has ended the
    request.
    """

    def __init__(self, prompt: tuple[int, ...], take: Callable[[SampleOutput], bool]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.finished = False
        self._prompt = prompt
        self._take = take

    def replace(self, theirs: Any) -> None:
        """Take the outputs of vLLM's collector from now on, and what it has already. Raises the error that it has."""
        theirs.put = self._put
        if (output := theirs.get_nowait()) is not None:
            self._put(output)

    def take_ids_of(self, state: Any) -> None:
        """Take only token ids from now on, before vLLM makes two objects of each for its own collector."""

        def make_request_output(
            new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *_: Any, **__: Any
        ) -> None:
            if not self.ended.done():
                output = SampleOutput(tuple(new_token_ids), None, (), state.num_cached_tokens)
                self._receive(output, finish_reason is not None)

        state.make_request_output = make_request_output

    def _put(self, output: Any) -> None:
        """Take an output or an exception."""
        if self.ended.done():
            return
        if isinstance(output, Exception):
            self._end(output)
            return
        self._receive(_read_output(output, self._prompt), output.finished)

    def _receive(self, output: SampleOutput, finished: bool) -> None:
        """Take an output. It raises nothing, because vLLM would then end all requests."""
        self.finished = finished
        try:
            if not self._take(output) or finished:
                self._end()
        except Exception as problem:
            self._end(problem)

    def _end(self, problem: Exception | None = None) -> None:
        if self.ended.done():  # taking the last output has cancelled the request
            return
        if problem is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(problem)


def prepare_environment(verbose: bool) -> None:
    """Set the environment of vLLM's processes. Call it before vLLM is imported."""
    os.environ.update(_ENVIRONMENT)
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def open_model(settings: messages.LoadVllm) -> LoadedVllm:
    """Load the model on the running event loop, from the main thread. Raises `SettingError`.

    Linux ends vLLM's processes when the thread ends that has started them. So it must be the main thread.
    """
    folder = read_folder(Path(settings.path))
    prepare_environment(settings.verbose)
    try:
        import tokenizers
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError
    except Exception as problem:  # compiled libraries that do not fit together raise exceptions of many classes
        raise SettingError(f"vLLM cannot be imported: {_shown(problem)}. {_OTHER_PYTHON}") from problem
    check_version(vllm.__version__)
    files = ModelFiles(folder.files)
    arguments = make_arguments(settings, AsyncEngineArgs, FlexibleArgumentParser)
    try:
        config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)  # with the defaults of a server
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as problem:  # vLLM raises exceptions of many classes
        raise SettingError(f"vLLM could not load {settings.path}: {_shown(problem)}") from problem
    files.confirm_loaded()
    tokenizer = FolderTokenizer(folder, int(config.model_config.get_vocab_size()), tokenizers)
    model_info = _model_info(settings, folder, config, tokenizer)
    digest = hashlib.sha256(files.digest())
    digest.update(_numbers(settings, vllm.__version__, config).encode())
    digest.update(msgspec.msgpack.encode(msgspec.structs.replace(model_info, sequences=0, capacity=None)))
    model_info = msgspec.structs.replace(model_info, fingerprint="fp_" + digest.hexdigest()[:16])
    batch_tokens = int(config.scheduler_config.max_num_batched_tokens)
    return LoadedVllm(llm, model_info, tokenizer, batch_tokens, EngineDeadError)


def check_version(version: str) -> None:
    """Raise `SettingError` for a version of vLLM that is too old."""
    if is_too_old(version):
        raise SettingError(f"vLLM {version} is installed, but {OLDEST_TEXT} or later is needed.")


def make_arguments(settings: messages.LoadVllm, kind: Any, parser_kind: Any) -> Any:
    """vLLM's engine arguments from its own command-line flags. Raises `SettingError` for invalid flags."""
    said = io.StringIO()
    try:
        parser = kind.add_cli_args(parser_kind(prog="vllm", add_help=False, allow_abbrev=False))
        with contextlib.redirect_stderr(said):
            parsed = parser.parse_args([f"--model={settings.path}", *_FLAGS, *settings.flags])
        return kind.from_cli_args(parsed)
    except SystemExit:
        raise SettingError(f"vLLM does not accept its flags: {_last_line(said.getvalue(), 'unknown flags')}") from None
    except Exception as problem:
        raise SettingError(f"vLLM does not accept its flags: {_shown(problem)}. {_OTHER_PYTHON}") from problem


def _model_info(settings: messages.LoadVllm, folder: ModelFolder, config: Any, tokenizer: FolderTokenizer) -> ModelInfo:
    """The model info without the fingerprint."""
    # vLLM always generates a token, so a prompt that is only scored must leave space for one.
    context = int(config.model_config.max_model_len) - 1
    cache, sequences = config.cache_config, int(config.scheduler_config.max_num_seqs)
    capacity = int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)
    return msgspec.structs.replace(
        tokenizer.model_info(LIMITS, settings.infill_template),
        parameters=folder.count_parameters(),
        context=context,
        sequences=sequences,
        capacity=capacity if 0 < capacity < sequences * context else None,
    )


def _numbers(settings: messages.LoadVllm, version: str, config: Any) -> str:
    """A text with everything but the files that can change a number: versions, runner, device, settings."""
    import torch
    from vllm.platforms import current_platform

    runner = "V2" if config.use_v2_model_runner else "V1"
    device = f"{current_platform.device_name} {current_platform.get_device_name()} {platform.machine()}"
    variables = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not _NOT_NUMBERS.search(name)
    )
    model, parallel = config.model_config, config.parallel_config
    shape = (model.dtype, model.quantization, model.max_model_len, config.cache_config.cache_dtype, parallel.world_size)
    return repr((version, torch.__version__, runner, device, variables, shape, settings.flags, config.compute_hash()))


def _parameters() -> Any:
    """vLLM's `SamplingParams`, without the end tokens that it adds by itself.

    It would add EOS to the tokens that `min_tokens` bans, although `ignore_eos` says that EOS is an ordinary token.
    """
    global _parameters_class  # noqa: PLW0603
    if _parameters_class is None:
        from vllm.sampling_params import SamplingParams

        class ExactParams(SamplingParams):  # type: ignore[misc, unused-ignore]
            def update_from_generation_config(self, *_: Any, **__: Any) -> None:
                return

        _parameters_class = ExactParams
    return _parameters_class


_parameters_class: Any = None


def _read_output(output: Any, prompt: tuple[int, ...]) -> SampleOutput:
    """The content of vLLM's output."""
    (part,) = output.outputs
    alternatives = None if part.logprobs is None else tuple(_alternatives(each) for each in part.logprobs)
    scores: tuple[PromptScore, ...] = ()
    if output.prompt_logprobs:
        scores = tuple(
            PromptScore(token, each[token].rank or 0, _alternatives(each))
            for token, each in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        )
    return SampleOutput(tuple(part.token_ids), alternatives, scores, output.num_cached_tokens or 0)


def _alternatives(found: dict[int, Any]) -> Alternatives:
    return [(token, float(each.logprob)) for token, each in found.items()]


def _shown(problem: Exception) -> str:
    return _last_line(str(problem), type(problem).__name__)


def _last_line(text: str, otherwise: str) -> str:
    """The last line of a message, without the link that pydantic adds."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("For further")), otherwise)[:500]
