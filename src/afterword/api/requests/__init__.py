"""What the API reads of a request, and what it records about it."""
