"""`python -m lewis_hub` is `lewis-hub`."""

from lewis_hub.cli.main import main

main()
