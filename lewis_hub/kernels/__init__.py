"""The hot loops on a CPU: plain loops that numba translates and LLVM compiles.

The loops are in `decode`, `threshold` and `vote`. They import numba, so only `compiler` imports
them. `calls` has a function of numpy arrays for each kernel, and the types of its arguments.
`machine_code` compiles, stores and loads a kernel. After a change to a loop, numba translates it
again on its next call; `make kernels` stores the translation in the package.
"""
