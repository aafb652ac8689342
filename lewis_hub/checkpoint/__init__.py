"""Weight files: the only package that opens them."""
