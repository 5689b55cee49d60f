"""A model that is larger than memory: the experts stay in their files, the rest is resident.

A token uses two experts of eight, and the rest of a layer is a fourteenth of them in size. Where
an expert's weights lie is asked of `expert_store` when the router has chosen: on a CPU by the
kernels, in the programs of `engine`; elsewhere between programs, layer by layer (`layerwise`).

What is counted against the budget is this process's own memory: everything resident, the keys and
values, working memory, and the experts that fill the rest. Pages of files that the system keeps
are not counted: it takes them back when it wants memory.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.checkpoint.loading import expert_arrays, load_params
from grok1.checkpoint.pinned import has_pinned_memory
from grok1.checkpoint.storage import StoredModel
from grok1.engine.base import EngineBase
from grok1.engine.compilation import Program
from grok1.engine.engine import Engine
from grok1.engine.programs import Programs, StepSpec
from grok1.keywords import shown
from grok1.machine import announcement
from grok1.machine.announcement import hint
from grok1.machine.cuda_driver import copier_of
from grok1.machine.device_memory import device_bytes_available
from grok1.machine.host_memory import gigabytes, gigabytes_apart, host_bytes_available
from grok1.machine.jax_settings import own_settings
from grok1.machine.progress import progress_bar
from grok1.offload.buffers import pageable_buffer
from grok1.offload.device_experts import DeviceExperts, device_buffer, pinned_buffer
from grok1.offload.expert_store import ExpertStore, Traffic
from grok1.offload.layerwise import LayerwiseStep
from grok1.ops import forms
from grok1.ops.experts import FetchedInt4Experts
from grok1.ops.formats import is_quantized
from grok1.planning.budget import budget, resident_bytes, without_experts
from grok1.planning.memory import (
    WORKING_BYTES,
    DoesNotFitError,
    head_copies_bytes,
    least_bytes,
    require_memory,
    shard_bytes,
    state_bytes,
)

Offload = Literal["auto", "none", "host", "disk"]
"""Where experts' weights are: see `factory.load`."""


_NUM_BUFFERS = 2  # experts that are read ahead of their use where they cannot be mapped
_NUM_IN_TRANSFER = 2  # experts on a device beside those kept there: one comes, one is computed with


class OffloadStats(NamedTuple):
    """What streaming has cost so far.

    Attributes:
      prompt: Of prompts, in chunks.
      decode: Of steps of decoding, each a token of every row.
      num_held: Experts in the host's memory.
      num_slots: Experts that it has room for.
      num_on_device: Experts in the memory of an accelerator.
      num_experts: Experts of the model.
      budget_bytes: What the process may take.
    """

    prompt: Traffic
    decode: Traffic
    num_held: int
    num_slots: int
    num_on_device: int
    num_experts: int
    budget_bytes: int

    def __str__(self) -> str:
        lines = []
        for what, traffic in (("chunk of the prompt", self.prompt), ("token", self.decode)):
            if traffic.steps:
                lines.append(
                    f"{traffic.seconds / traffic.steps:.2f} s a {what}, "
                    f"{gigabytes(traffic.bytes_read / traffic.steps)} read, "
                    f"expert hit rate {traffic.hit_rate:.1%}"
                )
        held = f"{self.num_held} of {self.num_experts} experts in memory"
        if self.num_on_device:
            held += f", {self.num_on_device} on the device"
        return "; ".join([*lines, held])


class Streamed:
    """An `engine.base.Runner` of a model whose experts are fetched; with the same numbers.

    A step is finished when its call returns. Ctrl-C ends it within a layer; a file that cannot be
    read is the `CheckpointError` of the step that wanted it. The state it was given is lost then,
    and the engine goes on with another.

    Attributes:
      runs_ahead: False: each step can be broken off, and counts for itself.
      has_room: False: what memory there is experts take.
      store: Where experts come from.
      device_experts: How they come to the device; None where the kernels fetch them.
      budget_bytes: What the process may take.
    """

    runs_ahead = has_room = False

    def __init__(self, store: ExpertStore, device: Any, budget_bytes: int):
        """Fetches nothing yet.

        Args:
          store: Where experts come from.
          device: What computes with them.
          budget_bytes: What the process may take.
        """
        self.store, self.budget_bytes = store, budget_bytes
        self.device_experts = DeviceExperts(store, device) if runs_by_layer(device) else None
        self._device = device
        self._traffic = {"prompt": Traffic(), "decode": Traffic()}

    @property
    def stats(self) -> OffloadStats:
        """What streaming has cost so far."""
        store = self.store
        return OffloadStats(
            **self._traffic,
            num_held=store.num_held,
            num_slots=store.capacity,
            num_on_device=len(self.device_experts.cache) if self.device_experts else 0,
            num_experts=store.num_all,
            budget_bytes=self.budget_bytes,
        )

    def make_room(self, engine: EngineBase, batch: int, capacity: int) -> None:
        """Lets go of the experts in memory whose room a state needs, or lets in as many as fit.

        Raises:
          ValueError: If the budget does not hold the state.
        """
        needed = state_bytes(engine, batch, capacity)
        with self.store.lock:
            self.store.resize(num_slots(engine, self.store, needed, self.budget_bytes))
            if self.device_experts is not None:
                self.device_experts.cache.shrink(self._num_device_slots(needed))

    def _num_device_slots(self, state_bytes: int) -> int:
        """How many experts fit on the device beside a state, what works there and what comes."""
        assert self.device_experts is not None
        available = device_bytes_available(self._device)
        if available is None:
            return 0
        held = len(self.device_experts.cache)
        room = available - state_bytes - WORKING_BYTES
        return max(0, held + room // self.store.num_bytes - _NUM_IN_TRANSFER)

    def step(self, programs: Programs, spec: StepSpec) -> Any:
        """Returns the step's program, or its pieces, with the threads that fetch for it."""
        return programs.get(spec.key, lambda: self._streamed(programs, spec))

    def _streamed(self, programs: Programs, spec: StepSpec) -> "_StreamedProgram":
        if self.device_experts is None:
            program = programs.step(spec)
        else:
            program = LayerwiseStep(programs, spec, self.device_experts)
        decodes = spec.key.decodes
        # A token is its own progress, and a bar would get into the line that tokens are written to.
        num_layers = None if decodes else programs.setup.config.num_layers
        traffic = self._traffic["decode" if decodes else "prompt"]
        return _StreamedProgram(program, self.store, traffic, num_layers)


def stats_of(engine: EngineBase) -> OffloadStats | None:
    """Returns what streaming experts has cost so far; None for an engine that is resident."""
    return engine.runner.stats if isinstance(engine.runner, Streamed) else None


class _StreamedProgram:
    """A step's program with the threads that fetch for it."""

    def __init__(
        self,
        program: Program | LayerwiseStep,
        store: ExpertStore,
        traffic: Traffic,
        num_layers: int | None,
    ):
        self._program = program
        self._store, self._traffic, self._num_layers = store, traffic, num_layers

    def __call__(self, *args):
        """Runs the program to its end.

        Raises:
          CheckpointError: If an expert cannot be read.
        """
        # Outside of the thread below, for whose end an interruption waits.
        if isinstance(self._program, Program):
            self._program.prepare(*args)
        start = time.perf_counter()
        # In another thread, because waiting for a program cannot be interrupted.
        with (
            self._store.lock,
            self._fetching(),
            ThreadPoolExecutor(1, "grok1-step") as pool,
        ):
            running = pool.submit(self._run, args)
            try:
                result = running.result()
            except BaseException:
                self._store.cancel()
                # Until the program has ended it computes from what it was given.
                while not running.done():
                    with contextlib.suppress(KeyboardInterrupt):
                        wait([running])
                raise
        self._traffic.steps += 1
        self._traffic.seconds += time.perf_counter() - start
        return result

    @own_settings()
    def _run(self, args: tuple):
        return jax.block_until_ready(self._program(*args))

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[None]:
        bar = progress_bar(
            self._num_layers,
            "prompt",
            self._num_layers is not None,
            unit="layer",
            unit_scale=False,
            delay=announcement.PATIENCE,
            leave=False,
        )
        self._store.begin(self._traffic, lambda layer: bar.update(layer + 1 - bar.n))
        try:
            yield
            self._store.check()
        except Exception:
            # The program's own words are that it was not given the weights.
            if self._store.error is not None:
                raise self._store.error from None
            raise
        finally:
            self._store.end()
            bar.close()


def is_offloaded(engine: Engine, offload: Offload, memory: float | str | None) -> bool:
    """Says whether experts are to be read when they are needed; on stderr why, if nobody asked.

    Args:
      engine: The whole model, of which only the shapes exist, on a mesh of real devices.
      offload: What is asked for.
      memory: The budget, if one is given.

    Raises:
      ValueError: If the choice is none of the four, several devices were to offload, or what
        must be resident does not fit.
    """
    if offload not in get_args(Offload):
        raise ValueError(
            f"offload must be 'auto', 'none', 'host' or 'disk', found {shown(offload)}"
        )
    if memory is not None and offload in ("none", "host"):
        raise ValueError(
            "memory must be left out, or given as a budget for offload='disk' or offload='auto', "
            f"found it with offload={offload!r}"
        )
    sizes, on_one = "x".join(map(str, engine.mesh.devices.shape)), engine.mesh.size == 1
    if offload in ("disk", "host"):
        if not on_one:
            raise ValueError(f"offloading runs on one device, found mesh {sizes}; give mesh='1x1'")
        return True
    if memory is not None and not on_one:
        raise ValueError(
            f"memory takes one device, as a budget for experts on disk, found it with mesh {sizes}"
            f"; give mesh='1x1' with it, or leave it out"
        )
    try:
        require_memory(engine)
    except DoesNotFitError as error:
        is_none = offload == "none"
        if not on_one or (is_none and not is_quantized(engine.params.layers.experts[0])):
            raise
        if is_none:
            remedy = "leave out offload='none', so that experts are read when they are needed, or "
            raise DoesNotFitError(error.problem, remedy + error.remedy) from None
        reason = error.problem
    else:
        if memory is None or engine.mesh.devices.flat[0].platform != "cpu":
            return False
        needed = least_bytes(engine) + head_copies_bytes(engine) + WORKING_BYTES
        if needed <= budget(memory):
            return False
        reason = f"the model takes {gigabytes(needed)}"
    hint(f"{reason}: experts are read when they are needed")
    return True


def load_offloaded(
    stored: StoredModel,
    whole: Engine,
    on_host: bool,
    memory: float | str | None,
    progress: bool,
) -> Engine:
    """Reads all of a checkpoint but its experts.

    Args:
      stored: As for `loading.load_params`.
      whole: The whole model, of which only the shapes exist, on one real device.
      on_host: Keep in memory every expert that was read once, instead of those in the budget.
      memory: The budget; see `budget`.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Raises:
      CheckpointError: If a file changes underneath, or a scale is not finite.
      ValueError: If the experts are not int8, or what has to be in memory does not fit.
    """
    config, mesh = whole.config, whole.mesh
    device = mesh.devices.flat[0]
    by_layer = runs_by_layer(device)
    pinned = by_layer and has_pinned_memory(device)
    copier = copier_of(device) if by_layer else None
    store = ExpertStore(
        expert_arrays(stored, config),
        allow_mapping=not by_layer,
        new_buffer=functools.partial(pinned_buffer, device) if pinned else pageable_buffer,
        new_passing=functools.partial(device_buffer, device, copier) if copier else None,
    )
    resident = Engine(without_experts(whole.params), config, mesh, whole.dtype, whole.cache_dtype)
    require_memory(resident)
    least_state = least_bytes(resident) - shard_bytes(resident.params)
    if on_host:
        # The cache may grow to the whole context.
        state = state_bytes(resident, resident.batch_for(1), config.sequence_len)
        budget_bytes = fixed_bytes(resident, store) + state + store.num_all * store.num_bytes
        available = host_bytes_available()
        if available is not None and budget_bytes > available:
            needed, there_are = gigabytes_apart(budget_bytes, available)
            raise ValueError(
                f"the experts do not fit in the host's memory: {needed} are needed and {there_are} "
                "available; give offload='disk'"
            )
    else:
        budget_bytes = budget(memory)
    store.resize(num_slots(resident, store, least_state, budget_bytes))
    params = load_params(stored, config, mesh, progress, without_experts)
    if not by_layer:
        handle = jax.device_put(store.fetch.handle, NamedSharding(mesh, P()))
        experts = params.layers.experts._replace(handle=handle)
        if isinstance(experts, FetchedInt4Experts):
            gate, _, down = whole.params.layers.experts
            *_, num_experts, num_blocks, hidden_size = gate.scales.shape
            sizes = (num_experts, hidden_size, num_blocks, down.scales.shape[-2])
            on_device = jax.device_put(np.array(sizes, np.uint32), NamedSharding(mesh, P()))
            experts = experts._replace(sizes=on_device)
        params = params._replace(layers=params.layers._replace(experts=experts))
    runner = Streamed(store, device, budget_bytes)
    return Engine(params, config, mesh, whole.dtype, whole.cache_dtype, runner=runner)


def runs_by_layer(device: Any) -> bool:
    """Whether a device's experts are brought to it between programs, not asked for by kernels."""
    return not forms.has_kernels(device.platform)


def fixed_bytes(engine: EngineBase, store: ExpertStore) -> int:
    """Returns what this process takes beside keys, values and the experts that it holds.

    Args:
      engine: With parameters `without_experts`, which may be abstract.
      store: Where the experts come from.
    """
    device = engine.mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    in_flight = 0 if store.is_mapped else _NUM_BUFFERS
    if on_cpu and runs_by_layer(device):
        in_flight += _NUM_IN_TRANSFER
    resident = resident_bytes(engine) if on_cpu else WORKING_BYTES
    return resident + in_flight * store.num_bytes


def num_slots(engine: EngineBase, store: ExpertStore, cache_bytes: int, budget_bytes: int) -> int:
    """Returns how many experts fit into a budget beside everything else.

    Args:
      engine: As for `fixed_bytes`.
      store: Where the experts come from.
      cache_bytes: Of keys, values and tokens.
      budget_bytes: What the process may take.

    Raises:
      ValueError: If not even the rest fits.
    """
    fixed = fixed_bytes(engine, store)
    if engine.mesh.devices.flat[0].platform != "cpu":
        cache_bytes = 0
    room = budget_bytes - fixed - cache_bytes
    if room < 0:
        given, needed = gigabytes_apart(budget_bytes, fixed + cache_bytes)
        # Up to a whole megabyte, so that what is asked for is enough.
        least = -(-(fixed + cache_bytes) // 10**6) / 1000
        raise ValueError(
            f"a memory budget of {given} is too small: {needed} have to be in memory, "
            f"{gigabytes(cache_bytes)} of them for keys and values; give at least {least:.3f} GB, "
            "or fewer or shorter prompts"
        )
    return min(room // store.num_bytes, store.num_all)
