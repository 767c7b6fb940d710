"""Opens a model of the upstream: reads the tokenizer of the local folder, and checks that the upstream fits to it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from afterword.engine.http.failures import UpstreamFailure
from afterword.engine.http.identity import Identity, find_identity
from afterword.engine.http.model import UpstreamModel
from afterword.engine.http.probe import Probe
from afterword.engine.http.upstream import Upstream
from afterword.engine.llama.model_files import ModelFiles
from afterword.engine.messages import LoadUpstream
from afterword.engine.protocol import JobLimits, ModelInfo
from afterword.engine.vllm.model_folder import ModelFolder, read_folder
from afterword.engine.vllm.requests import LIMITS
from afterword.engine.vllm.tokenizer import FolderTokenizer
from afterword.engine.vllm.versions import OLDEST_TEXT, is_too_old
from afterword.errors import SettingError

_OTHER_CONNECTIONS = 4  # beside those of the samples: for questions about the model

_log = logging.getLogger("afterword")


async def open_model(settings: LoadUpstream) -> UpstreamModel:
    """Open the model. Raises `SettingError`."""
    folder = read_folder(Path(settings.path))
    if not folder.vocabulary:
        raise SettingError(f"{folder.path / 'config.json'} states no vocab_size.")
    tokenizer = FolderTokenizer(folder, folder.vocabulary, _tokenizers())
    upstream = Upstream(settings.url, settings.key, settings.sequences + _OTHER_CONNECTIONS, settings.silence)
    try:
        return await _open(settings, folder, tokenizer, upstream)
    except BaseException:
        await upstream.close()
        raise


async def _open(
    settings: LoadUpstream, folder: ModelFolder, tokenizer: FolderTokenizer, upstream: Upstream
) -> UpstreamModel:
    try:
        identity = await find_identity(upstream, folder.path.name)
        if identity.version and is_too_old(identity.version):
            raise SettingError(f"{settings.url} runs vLLM {identity.version}, but {OLDEST_TEXT} or later is needed.")
        probe = Probe(upstream, identity, tokenizer)
        await probe.check()
        limits = await _limits(probe, settings.alternatives, tokenizer)
    except UpstreamFailure as problem:
        raise SettingError(f"The upstream {settings.url} cannot be used: {problem.detailed}.") from None
    info = _model_info(settings, folder, tokenizer, identity, limits)
    return UpstreamModel(upstream, identity, info, tokenizer, settings)


async def _limits(probe: Probe, wanted: int, tokenizer: FolderTokenizer) -> JobLimits:
    limits = msgspec.structs.replace(LIMITS, banned=_banned(tokenizer))
    most = await probe.most_alternatives(wanted)
    # A stream leaves out the least likely alternative of those that vLLM computes; scores of a prompt do not.
    scores = most + (most < wanted and await probe.scores_with(most + 1))
    if scores == most and not await probe.scores_with(most):
        raise SettingError(
            "The upstream reports fewer alternatives for the tokens of a prompt than for generated ones."
        )
    if most == wanted:
        return limits
    _log.warning(
        "The upstream reports few alternatives: 'logprobs' above %d is refused. Start vLLM with --max-logprobs %d.",
        most,
        wanted + 1,
    )
    return msgspec.structs.replace(limits, max_alternatives=most, max_prompt_alternatives=scores)


def _banned(tokenizer: FolderTokenizer) -> tuple[int, ...]:
    """The end tokens of the model, which vLLM does not sample for the first `min_tokens` tokens in any case."""
    eos = tokenizer.eos
    return tuple(sorted({*tokenizer.end_tokens, *(() if eos is None else (eos,))}))


def _model_info(
    settings: LoadUpstream, folder: ModelFolder, tokenizer: FolderTokenizer, identity: Identity, limits: JobLimits
) -> ModelInfo:
    most = (
        identity.length - 1
    )  # vLLM always generates a token, so a prompt that is only scored must leave space for one
    if settings.context is not None and settings.context > most:
        raise SettingError(f"--context {settings.context}: the upstream has at most {most} tokens per sequence.")
    info = msgspec.structs.replace(
        tokenizer.model_info(limits, settings.infill_template),
        parameters=_parameters(folder),
        context=settings.context or most,
        sequences=settings.sequences,
    )
    digest = hashlib.sha256(ModelFiles(folder.setting_files).digest())
    digest.update(repr(identity).encode())
    digest.update(msgspec.msgpack.encode(msgspec.structs.replace(info, sequences=0, job_limits=None)))
    return msgspec.structs.replace(info, fingerprint="fp_" + digest.hexdigest()[:16])


def _parameters(folder: ModelFolder) -> int:
    """The number of weights if the folder has them, which is not necessary."""
    try:
        return folder.count_parameters()
    except SettingError:
        return 0


def _tokenizers() -> object:
    try:
        import tokenizers
    except ImportError as problem:
        raise SettingError(f"--engine http needs the Python package tokenizers: {problem}.") from None
    return tokenizers
