"""Runs GGUF models with llama.cpp. The only room that knows the library; it lives in the engine's process."""
