"""Who may ask, how much, and what was used. Knows no web framework and no command line."""
