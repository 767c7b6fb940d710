"""Measures servers of `POST /v1/completions` and compares them with each other and with the machine's limits."""
