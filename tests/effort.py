"""How much the tests of tests/hardening do: 1 in the gate, more at night."""

import os

EFFORT = int(os.environ.get("LEWIS_HUB_LONG", "1"))
SEED = int(os.environ.get("LEWIS_HUB_SEED", "0"))  # where the seeds of drawn cases begin


def times(n_in_the_gate, most):
    """How often something is done: in the gate, and at night `most` times at most."""
    return min(n_in_the_gate * EFFORT, most)
