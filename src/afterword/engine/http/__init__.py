"""A vLLM server behind HTTP as engine: a worker that turns jobs into requests to its route for token ids."""
