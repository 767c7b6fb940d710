"""A simulation of N replicas that compares how requests are routed: `python -m bench.cluster`.

It is deterministic: a seed fixes the trace, and nothing depends on the clock of the machine. It measures no server.
"""
