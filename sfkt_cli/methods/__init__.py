"""One module a transfer method: a batch in, named loss terms out."""
