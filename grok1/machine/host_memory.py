"""The memory of the host that this process may still take."""

import pathlib
from collections.abc import Iterator

from grok1.machine import control_groups

_GROUP_FILES = "max", ("anon", "shmem")
_FIRST_GROUP_FILES = "limit_in_bytes", ("total_rss", "total_shmem")


def host_bytes_available() -> int | None:
    """Returns the memory that this process can still have; None where that cannot be known.

    Files in the page cache count as available, and so does swap space. In a container the limits,
    that of swap space too, are the container's, which `/proc/meminfo` does not show.
    """
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        swap = min([fields["SwapFree"], *_swap_limits()])
        available = fields["MemAvailable"] + swap
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([available, *_group_limits(swap)])


def _group_limits(
    swap: int,
    root: pathlib.Path = control_groups.ROOT,
    own: pathlib.Path = control_groups.OWN,
) -> Iterator[int]:
    """Yields what each control group of this process that has a limit leaves it."""
    for version, directory in control_groups.directories("memory", root, own):
        names = _GROUP_FILES if version == 2 else _FIRST_GROUP_FILES
        try:
            yield _left_by_group(directory, *names) + swap
        except (OSError, ValueError, KeyError):
            continue  # no limit is the word "max"


def _swap_limits(
    root: pathlib.Path = control_groups.ROOT, own: pathlib.Path = control_groups.OWN
) -> Iterator[int]:
    """Yields what each control group of this process leaves it of swap space, where it says so."""
    for version, directory in control_groups.directories("memory", root, own):
        try:
            if version == 2:
                limit, used = _number(directory, "swap.max"), _number(directory, "swap.current")
            else:
                # Of memory and swap space together; kernels may be without.
                limit = _number(directory, "memsw.limit_in_bytes")
                limit -= _number(directory, "limit_in_bytes")
                used = _counts(directory).get("total_swap", 0)
        except (OSError, ValueError):
            continue  # no limit is the word "max"
        yield max(0, limit - used)


def _number(directory: pathlib.Path, name: str) -> int:
    return int((directory / f"memory.{name}").read_text())


def _counts(directory: pathlib.Path) -> dict[str, int]:
    lines = (directory / "memory.stat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _left_by_group(directory: pathlib.Path, limit_name: str, counts: tuple[str, str]) -> int:
    limit, used = _number(directory, limit_name), _counts(directory)
    # Pages of files are not counted: the kernel drops them when memory is wanted.
    return limit - used[counts[0]] - used.get(counts[1], 0)


def gigabytes_apart(*amounts: float) -> list[str]:
    """Returns numbers of bytes in words, with as many digits as it takes to tell them apart."""
    for digits in range(2, 9):
        shown = [f"{num_bytes / 1e9:.{digits}f} GB" for num_bytes in amounts]
        if len(set(shown)) == len(set(amounts)):
            return shown
    return [f"{num_bytes:,.0f} bytes" for num_bytes in amounts]


def gigabytes(num_bytes: float) -> str:
    """Returns a number of bytes in words: "39.80 GB"."""
    return f"{num_bytes / 1e9:.2f} GB"
