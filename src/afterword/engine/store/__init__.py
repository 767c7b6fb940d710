"""The store of prefixes: parts of slots' states in the files of one folder, which survive the process."""
