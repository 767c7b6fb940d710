"""The worker process that uses a vLLM server: `python -m afterword.engine.http FD FD`."""

from __future__ import annotations

from afterword.engine.http.worker import main

if __name__ == "__main__":
    main()
