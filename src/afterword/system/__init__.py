"""The machine's resources, and background tasks and threads that log their failures."""
