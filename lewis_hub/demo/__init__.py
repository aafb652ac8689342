"""The demo, and the zoo: a tiny trained base, its experts and their data."""
