"""What the operating system gives to the process: memory, cores, background tasks."""
