"""The playground in a real browser: one server and one Chromium for all tests.

Not part of `make test`: `make browser` runs them. Without Chromium on the path they are skipped.
"""
