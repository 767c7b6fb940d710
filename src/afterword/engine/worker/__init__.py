"""The part of the engine that runs in the worker process, whatever library it uses."""
