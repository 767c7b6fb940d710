"""Batch jobs: many requests in a file, answered in any order, written in theirs, whatever happens on the way."""
