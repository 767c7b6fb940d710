"""vLLM as engine: a worker that runs in vLLM's own Python environment, and turns jobs into vLLM's requests."""
