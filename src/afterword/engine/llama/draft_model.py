"""Loads the draft model of `--draft-model` beside the model that verifies its drafts, in the same process."""

from __future__ import annotations

from afterword.engine.core.verification import can_verify
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.engine.worker.worker_main import LoadedDraft
from afterword.errors import SettingError


def open_draft(settings: LoadModel, runner: LlamaRunner) -> LoadedDraft | None:
    """Load the draft model for a loaded model; None if the settings name none, or if drafts could not be verified.

    Raises `SettingError`. The kernels' settings are those of `runner` afterwards.
    """
    if settings.draft is None or not can_verify(runner):
        return None
    draft = LlamaRunner(settings.draft)
    if not draft.can_truncate:
        raise SettingError(f"{settings.draft.path} cannot be a draft model: its state cannot be cut.")
    runner.configure_kernels(alone=draft.computes_all)
    return LoadedDraft(draft, settings.draft.context, min(draft.vocabulary, runner.vocabulary))
