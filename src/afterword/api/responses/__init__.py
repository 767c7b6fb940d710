"""Encoding responses as JSON and server-sent events."""
