"""Runs GGUF models with llama.cpp, in the worker process. No other package may load the library."""
