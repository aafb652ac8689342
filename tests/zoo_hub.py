"""The zoo on the tests' embedded Hub."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from lewis_hub.demo.zoo import seed_hub
from lewis_hub.localhub.server import serve
from lewis_hub.localhub.store import Store


def put_zoo(hub):
    """Leave a Hub as `seed_hub` does; the zoo is uploaded once for all tests of a process."""
    root = seeded_folder()
    for name in ("repos", "blobs"):
        shutil.copytree(root / name, hub.root / name, dirs_exist_ok=True)
    hub.store.repos |= Store(root).repos


@cache
def seeded_folder():
    """The folder of a Hub to which the zoo was uploaded."""
    folder = Path(tempfile.mkdtemp(prefix="lewis-hub-zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with serve(folder) as hub:
        seed_hub(hub.api())
    return folder
