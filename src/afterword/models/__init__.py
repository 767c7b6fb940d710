"""Finds, downloads and checks model files, and computes whether a model fits this machine's memory.

The package knows files, the Hugging Face Hub and GGUF headers. It must not import the engine, the HTTP server or
`completion/`.
"""
