"""ASGI middleware: authentication, rate limit headers, host check."""
