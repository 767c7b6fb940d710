"""Checks and records around routes: request context, host check, API keys and their limits."""
