"""The machine's resources, and background tasks and threads whose failures are logged."""
