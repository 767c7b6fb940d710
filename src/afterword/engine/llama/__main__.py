"""`python -m afterword.engine.llama FD FD` runs the worker process with llama.cpp."""

from __future__ import annotations

from afterword.engine import messages
from afterword.engine.llama import library
from afterword.engine.llama.draft_model import open_draft
from afterword.engine.llama.prefix_store import open_store
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import make_model_info
from afterword.engine.store_stats import StoreStats
from afterword.engine.worker import worker_main


def load(settings: messages.LoadModel, report_progress: worker_main.ReportProgress) -> worker_main.LoadedModel:
    """Load the model that `settings` names. Raises `SettingError`."""
    library.initialize(settings.verbose)
    runner = LlamaRunner(settings, report_progress)
    model_info, vocabulary = make_model_info(runner, settings)
    store = open_store(settings, runner, model_info.fingerprint)
    draft = open_draft(settings, runner)
    return worker_main.LoadedModel(
        *(runner, model_info, vocabulary.parts, runner.thread_pool, runner.files.check),
        store=store,
        store_stats=store.stats if store else StoreStats,
        token_texts=vocabulary.texts(),
        draft=draft,
    )


worker_main.serve(load)
