"""A reference implementation that shares no code with the engine, and tiny model files for tests."""
