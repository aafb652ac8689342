"""The tokens and ids of every source and of the merge. The caller reads and writes the files."""
