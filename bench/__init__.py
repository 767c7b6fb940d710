"""Measures servers of `POST /v1/completions` against each other, and against what the machine allows."""
