"""The control groups that this process is in: where Linux keeps what a container may have."""

import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path("/sys/fs/cgroup")
OWN = pathlib.Path("/proc/self/cgroup")


def directories(
    controller: str, root: pathlib.Path = ROOT, own: pathlib.Path = OWN
) -> Iterator[tuple[int, pathlib.Path]]:
    """Yields (version, directory) for this process's group and those above it, if there are any.

    Args:
      controller: What they limit: "memory" or "cpu".
      root: Where groups are mounted.
      own: What says which one is this process's.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # The second version has no names of controllers, the first has a tree for each.
        if not controllers:
            version, top = 2, root
        elif controller in controllers.split(","):
            version, top = 1, root / controller
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(top):
                break
            yield version, directory
