"""Where models come from: the disk, the Hub and the wheel, and whether one fits this machine.

This room knows files, the Hub and GGUF headers; it knows no engine, no HTTP server and no completion.
"""
