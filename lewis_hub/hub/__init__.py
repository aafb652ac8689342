"""The only package that connects to the Hub."""
