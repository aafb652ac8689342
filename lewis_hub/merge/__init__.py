"""From a plan to shards on disk."""
