"""One model on the devices of many processes: how they meet, and how they fail together.

`jax.distributed` does the work: it finds the other processes, and ends all of them when one of them
is gone. What is added here is that an error in one process is an error, with its words, in all.
"""

import contextlib
import importlib.util
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from jax._src import distributed as jax_distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from grok1.machine.output import on_descriptor, writes_to

_HEARTBEAT_SECONDS = 20  # A process that was silent for so long is taken for dead.
_SHUTDOWN_SECONDS = 20
_START_SECONDS = 300  # In which process 0 must answer the others.
_RETRY_SECONDS = 0.2
_CHECK_SECONDS = 1.0
_FAILURE_MILLISECONDS = 30 * 1000
_BARRIER_MILLISECONDS = 24 * 3600 * 1000  # Dead processes end it earlier.

_numbers = itertools.count()
_outer_check: Callable[[], None] | None = None
_names_in_block: Iterator[str] | None = None


class OtherProcessError(RuntimeError):
    """Another of the processes failed, or does not do the same; the message says which, and how."""


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
) -> int:
    """Joins the processes that run this program, before anything else uses JAX.

    Every process then makes the same calls with the same arguments; `load` puts the model on the
    devices of all. Under Slurm, Open MPI, on Cloud TPUs and, with the package `kubernetes`, in an
    indexed Kubernetes job, nothing need be given; without such a launcher and without arguments,
    the process is alone. On CPUs the processes speak through Gloo.

    Args:
      coordinator: "host:port" of process 0, free there and reachable from all; None for that of
        JAX_COORDINATOR_ADDRESS or of the launcher.
      num_processes: How many processes there are.
      process_id: Which one this is, from 0.
      local_device_ids: Numbers of the host's GPUs that this process takes. None for those of
        JAX_LOCAL_DEVICE_IDS; otherwise, under Slurm and Open MPI, for the one of the process's own
        number on the host, and elsewhere for all.

    Returns:
      The number of this process; 0 is the one that should print.

    Raises:
      ValueError: If only some of the first three are given and no launcher knows the others, or
        they are impossible.
      RuntimeError: If JAX has started already, or the coordinator that is given does not answer
        within five minutes. Where it answers and another process does not come, JAX ends the
        process itself.
    """
    if jax.distributed.is_initialized():
        return jax.process_index()
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None) and not _is_launched():
        _show_devices(local_device_ids)
        return 0
    _check(*given)
    # Without their number there is nothing to wait for, but an error that says so.
    if coordinator is not None and process_id and (num_processes or _is_launched()):
        _wait_for(coordinator)
    # Where only some are given, a launcher may know the rest, such as a process's local devices.
    method = "deactivate" if None not in given and not _is_launched() else None
    # It takes SIGTERM for a warning, to save what is being trained, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            local_device_ids,
            cluster_detection_method=method,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"found coordinator={coordinator}, num_processes={num_processes} and "
            f"process_id={process_id}, and no launcher says more: {error} Give all three"
        ) from error
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        _keep_stdout_for_python()
    return jax.process_index()


def is_first() -> bool:
    """Whether this process speaks for all; to ask starts no device in one that is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(
                "coordinator must be HOST:PORT, with a free port of process 0's host, as "
                f"host0:12345, found {coordinator!r}"
            )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes must be 1 or more, found {num_processes}")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1, found {process_id} with "
            f"num_processes {num_processes}"
        )


def _wait_for(coordinator: str) -> None:
    """Waits until process 0 listens: JAX would abort this process where it does not."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CHECK_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"coordinator {coordinator}: does not answer after {_START_SECONDS} s: "
                    f"{error}; start process 0 on that host, and see that the port is open"
                ) from error
        time.sleep(_RETRY_SECONDS)


def _show_devices(local_device_ids: Sequence[int] | None) -> None:
    """A process that is alone takes the GPUs that it is told as well."""
    if local_device_ids is not None:
        for platform in ("cuda", "rocm"):
            numbers = ",".join(map(str, local_device_ids))
            jax.config.update(f"jax_{platform}_visible_devices", numbers)


@contextlib.contextmanager
def together() -> Iterator[Callable[[], None]]:
    """A block that ends in all processes or fails in all, with the error of the one that failed.

    A block within another is part of it: what fails there has to end the outer one everywhere.

    Yields:
      A function to call now and then, which raises once another process has failed.

    Raises:
      OtherProcessError: If another process failed in the block.
    """
    global _outer_check, _names_in_block
    # Which must be known without starting the devices: a wrong path should be told at once.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield lambda: None
        return
    if _outer_check is not None:
        yield _outer_check
        return
    client = jax_distributed.global_state.client
    assert client is not None  # there are several processes
    # Every process enters the same blocks in the same order.
    name = f"grok1/{next(_numbers)}"
    next_check = 0.0

    def check(now: bool = False) -> None:
        nonlocal next_check
        if now or time.monotonic() >= next_check:
            next_check = time.monotonic() + _CHECK_SECONDS
            failures = client.key_value_dir_get(f"{name}/failed")
            if failures:
                raise OtherProcessError(sorted(failures)[0][1])

    _outer_check = check
    _names_in_block = (f"{name}/{number}" for number in itertools.count())
    try:
        yield check
    except BaseException as error:
        # Nobody leaves before all know, and nothing that goes wrong here hides the error.
        with contextlib.suppress(Exception):
            if not isinstance(error, OtherProcessError):
                cause = f"{type(error).__name__}: {error}".rstrip(": ")
                words = f"process {jax.process_index()} of {jax.process_count()} failed: {cause}"
                client.key_value_set(f"{name}/failed/{jax.process_index()}", words)
            client.wait_at_barrier(name, _FAILURE_MILLISECONDS)
        raise
    finally:
        _outer_check = _names_in_block = None
    client.wait_at_barrier(name, _BARRIER_MILLISECONDS)
    check(now=True)


def name_in_block() -> str | None:
    """Returns a name for an exchange in the block of `together` that runs; None outside of one.

    It is the same in every process that has come as far, whatever has failed in blocks before.
    """
    return None if _names_in_block is None else next(_names_in_block)


def check_others() -> None:
    """Raises once another process has failed in the block of `together` that runs, if one does.

    Raises:
      OtherProcessError: With the other's error.
    """
    if _outer_check is not None:
        _outer_check()


def _keep_stdout_for_python() -> None:
    """Gloo reports its connections on the standard output; from now on they go to stderr."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    # A notebook's output is no descriptor, and stays as it is.
    if writes_to(sys.stdout, 1):
        sys.stdout = on_descriptor(sys.stdout, own)


def _is_launched() -> bool:
    """Whether this is one of several processes that a launcher of jax.distributed's has started."""
    environment = os.environ
    return (
        ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or (
            "JOB_COMPLETION_INDEX" in environment
            and importlib.util.find_spec("kubernetes") is not None
        )
        or running_in_cloud_tpu_vm
    )
