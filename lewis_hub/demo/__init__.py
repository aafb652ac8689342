"""The zoo: a tiny trained base, its experts and their data."""
