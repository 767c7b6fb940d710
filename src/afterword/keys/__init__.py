"""API keys, their rate limits and quotas, and the usage records. It imports no web framework and no command line."""
