"""Takes away what macOS or Windows lacks: Python imports this at its start, from PYTHONPATH.

`fcntl` and `resource` are missing for lewis_hub only, because asyncio imports fcntl on Linux. In
the place of `msvcrt` there is a lock by `fcntl`.
"""

import builtins
import fcntl
import mmap
import os
import subprocess  # noqa: F401 - takes a system with msvcrt for Windows
import sys
from types import ModuleType

import psutil  # noqa: F401 - reads os.sysconf on Linux

CALLS = {
    os: (
        *("O_DIRECTORY", "POSIX_FADV_DONTNEED", "WNOHANG", "fdatasync", "killpg"),
        *("posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev"),
        *("sched_getaffinity", "sysconf", "wait4"),
    ),
    mmap: ("PROT_READ",),
}
MODULES = ("fcntl", "resource")

for module, names in CALLS.items():
    for name in names:
        delattr(module, name)

_import = builtins.__import__


def import_what_there_is(name, context=None, *more, **named):
    if name in MODULES and str((context or {}).get("__name__")).startswith("lewis_hub"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import(name, context, *more, **named)


builtins.__import__ = import_what_there_is

windows = ModuleType("msvcrt")
windows.LK_NBLCK = 2
windows.locking = lambda file, *_: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
sys.modules["msvcrt"] = windows
