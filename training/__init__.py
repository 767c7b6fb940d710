"""The recipe of Afterword's built-in model: data, tokenizer, training, export. Not part of the server."""
