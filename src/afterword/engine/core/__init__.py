"""Scheduling and sampling for any library that turns batches of tokens into rows of logits."""
