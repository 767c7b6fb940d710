"""Constrained output: compiles grammars and computes token masks with llguidance, in threads of the worker process."""
