"""Whatever turns jobs into steps: the protocol, the process it runs in, and the engines."""
