"""The recipe: its schema, its rules, and how it is read from a file."""
