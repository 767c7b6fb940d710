"""Test instruments that share no code with an engine: a judge of its numbers, and tiny models to load."""
