"""The Completions API over any `engine.protocol.Engine`: request, plan, run, deltas. No HTTP and no model library."""
