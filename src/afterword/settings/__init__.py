"""How limits and durations are declared and parsed."""
