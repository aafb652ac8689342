"""The zoo on the tests' embedded Hub."""

import shutil
from functools import cache

from lewis_hub.demo.zoo import seed_hub
from lewis_hub.localhub.server import serve
from lewis_hub.localhub.store import Store


def put_zoo(hub):
    """Leave a Hub as `seed_hub` does; the zoo is uploaded once for all tests of a process."""
    root = seeded(hub.root.with_name("zoo"))
    for name in ("repos", "blobs"):
        shutil.copytree(root / name, hub.root / name, dirs_exist_ok=True)
    hub.store.repos |= Store(root).repos


@cache
def seeded(folder):
    """Upload the zoo to a Hub in a folder beside the tests' own, and return the folder."""
    with serve(folder) as hub:
        seed_hub(hub.api())
    return folder
