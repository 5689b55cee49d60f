"""What the processes of one program have to do alike, compared before they do it.

Each computes its part of the same steps. If one has other weights, another option or another
prompt, the others go on with numbers that mean nothing, or wait for it for ever. So what must be
the same is written out, in short words or as a digest, and compared through the coordination
service of `jax.distributed`: one small exchange.
"""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.sharding import Mesh

from grok1.machine.processes import OtherProcessError, check_others, name_in_block

_LONGEST_WORD = 60  # of a value that is compared as it is; a digest stands for a longer one
_FIRST_WAIT, _LONGEST_WAIT = 0.0005, 0.05  # seconds between two looks at what the others say
_numbers: dict[tuple[int, ...], itertools.count] = {}


def agree(what: str, items: Callable[[], Mapping[str, Any]], mesh: Mesh | None = None) -> None:
    """Checks that all processes give the same items; where they do not, all of them fail.

    Args:
      what: Names the call in messages, such as "load"; all processes make the same one.
      items: Returns what must be the same, by the name that a message gives it: plain values,
        arrays, and sequences, sets, mappings and dataclasses of these. Not called where the process
        is alone.
      mesh: The devices whose processes take part; None for all processes.

    Raises:
      OtherProcessError: If processes differ, or another one has failed.
    """
    said = exchange(what, lambda: {name: _words(value) for name, value in items().items()}, mesh)
    names = dict.fromkeys(name for words in said.values() for name in words)
    different = []
    for name in names:
        values = {rank: words.get(name, "nothing") for rank, words in said.items()}
        if len(set(values.values())) > 1:
            different.append(f"{name} is {_by_value(values)}")
    if different:
        raise OtherProcessError(
            f"processes disagree about {what}: {'; '.join(different)}. Give all of them the same"
        )


def exchange(
    what: str, words: Callable[[], Mapping[str, str]], mesh: Mesh | None = None
) -> dict[int, dict[str, str]]:
    """Returns what each process says, by its number; nothing where this one is alone.

    Args:
      what: The call that every process makes.
      words: Returns what this process says.
      mesh: Whose processes take part; None for all.

    Raises:
      OtherProcessError: If another process makes another call, or has failed.
    """
    members = _members(mesh)
    if len(members) < 2:
        return {}
    client = jax_distributed.global_state.client
    assert client is not None  # there are several processes
    name, before = name_in_block(), None
    if name is None:
        # Every process makes the same calls in the same order.
        number = next(_numbers.setdefault(members, itertools.count()))
        calls = f"grok1/calls/{_digest(repr(members))}"
        name, before = f"{calls}/{number}", f"{calls}/{number - 1}" if number else None
    own = jax.process_index()
    client.key_value_set(f"{name}/{own}", json.dumps({"call": what, **words()}))
    wait = _FIRST_WAIT
    while len(found := client.key_value_dir_get(f"{name}/")) < len(members):
        check_others()
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
    if before is not None:
        # All have begun this exchange, so that none still reads the one before.
        client.key_value_delete(f"{before}/{own}")
    said = {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
    said = {rank: said[rank] for rank in sorted(said)}
    calls = {rank: words.pop("call") for rank, words in said.items()}
    if len(set(calls.values())) > 1:
        raise OtherProcessError(
            f"processes make different calls, {_by_value(calls)}; all of them have to make the "
            "same ones, in the same order"
        )
    return said


def _members(mesh: Mesh | None) -> tuple[int, ...]:
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return (0,)
    if mesh is None:
        return tuple(range(jax.process_count()))
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def _by_value(values: Mapping[int, str]) -> str:
    """Says which processes have which value: "'a' in process 0, 'b' in processes 1 to 3"."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} in {_processes(having)}" for value, having in ranks.items())


def _processes(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"processes {ranks[0]} to {ranks[-1]}"
    return f"processes {', '.join(map(str, ranks))}"


def _words(value: Any) -> str:
    """A value in words; the digest of one that would be long."""
    canonical = _canonical(value)
    return canonical if len(canonical) <= _LONGEST_WORD else f"sha256 {_digest(canonical)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _canonical(value: Any) -> str:
    """Text that is equal for equal values, whichever process writes it."""
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, (int, float, np.number)):
        number = value.item() if isinstance(value, np.number) else value
        return repr(int(number) if float(number).is_integer() else number)
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.ascontiguousarray(value)
        if array.ndim == 1 and np.issubdtype(array.dtype, np.integer):
            return _canonical(array.tolist())  # ids are the same in a list and in an array
        return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {_canonical(of)}' for key, of in value.items()))}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(_canonical, value)))}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_canonical, value))}]"
    if isinstance(value, slice):
        return f"slice{_canonical([value.start, value.stop, value.step])}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__name__}{_canonical(fields)}"
    # A function, or an object of the caller's: its name is what processes can compare.
    return getattr(value, "__qualname__", type(value).__qualname__)
