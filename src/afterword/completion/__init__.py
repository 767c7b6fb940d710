"""What the Completions API means, over any engine. Pure: no HTTP, no model library, no clock."""
