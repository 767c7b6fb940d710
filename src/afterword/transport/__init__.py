"""TCP connections: how many are open, how long each part of a request may take, and when they close."""
