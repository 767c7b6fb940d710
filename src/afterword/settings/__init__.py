"""Declares and parses limits and durations."""
