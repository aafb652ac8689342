"""How task vectors become one tensor."""
