"""Runs replicas of the server with Ray Serve: each replica is a whole Afterword with its own queue and workers."""
