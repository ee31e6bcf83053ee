"""Pallas kernels for TPUs, one file an op: the path is the registration.

takes(*arrays, **options)   yields (code, reason, fix) for what the kernel does not take; shapes and dtypes only
run(*arrays, **options)     the op over jax arrays; interpreted where emulated() is true
plan(*arrays, **options)    what its cost model chose, in words, for `explain`
pays(*arrays, **options)    where a module has it: whether the kernel is worth more than what XLA makes of plain(...)
"""
