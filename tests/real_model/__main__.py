"""`python -m tests.real_model`: downloads SmolLM2-135M-Instruct (93 MB) for the tests that need a real model."""

from . import FILE, fetch

if __name__ == "__main__":
    fetch()
    print(FILE)
