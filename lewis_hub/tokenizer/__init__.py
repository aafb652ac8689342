"""Which token each id stands for, in every source and in the merge. Reads no file itself."""
