"""The hot loops on a CPU: plain loops that numba compiles once and that are stored on disk.

The loops are in `decode`, `threshold`, `ranks` and `vote`. They import numba, so only `compiler`
imports them. `calls` has a function of numpy arrays for each kernel, `operands` the types of its
arguments. `machine_code` stores and loads the compiled code. After a change to a loop, it is
compiled again on its next call; nothing else has to be done.
"""
