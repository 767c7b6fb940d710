"""Scheduling and sampling for any library that computes rows of logits from forward batches of tokens."""
