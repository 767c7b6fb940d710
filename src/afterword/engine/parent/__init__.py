"""The part of the engine that runs in the server process: supervisor, model manager, watchdog, tokenizer client."""
