"""The part of the engine that runs in the server's process."""
