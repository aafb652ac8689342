"""The only room that opens weight files."""
