"""`python -m lewis_hub` is `lewis-hub`."""

from lewis_hub.cli.main import main

if __name__ == "__main__":  # not in a process that multiprocessing spawns
    main()
