"""Benchmark scores and what they allow one to say."""
