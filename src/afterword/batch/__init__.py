"""Batches: a file of requests is answered in any order; the output has the order of the input, after restarts too."""
