"""The part of the engine that runs in the worker process and is independent of the library that computes."""
