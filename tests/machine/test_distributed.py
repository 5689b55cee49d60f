"""Several processes: the same output, each byte read once, and no process that outlives another."""

import json
import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import grok1
from grok1.machine import processes
from tests.helpers import flags_with_devices, relative_error, slow

ROOT = pathlib.Path(__file__).parent.parent.parent
JOIN = "import grok1; grok1.initialize_distributed({coordinator!r}, {count}, {rank})\n"
COMPUTE = """
import os, sys, jax, numpy as np
counted, preadv = [0], os.preadv
def counting(*arguments):
    counted[0] += (size := preadv(*arguments))
    return size
os.preadv = counting
from grok1.checkpoint import native
native.is_available = lambda: False
def load(mesh):
    return grok1.load({path!r}, mesh=mesh, dtype="float32", progress=False)
model = load((1, {devices}))
num_read = counted[0]
assert model.engine.most_steps == 1  # else processes would choose different numbers
held = sum(s.data.nbytes for x in jax.tree.leaves(model.params) for s in x.addressable_shards)
prompts = [[1, 2, 3, 4], [5, 6, 7]]
completions = model.generate(prompts, max_new_tokens=8, temperature=0, ignore_eos=True)
tokens = np.load({reference!r})["tokens"]
if {count} == 2:  # each process has other rows of the batch
    logits = load((2, {devices} // 2)).logits(np.tile(tokens, (3, 1)))
else:
    logits = model.logits(tokens[None])
np.savez({output!r} + "/{rank}", read=num_read, held=held, logits=logits,
         greedy=[c.tokens for c in completions])
try:
    grok1.save(model, {output!r} + "/copy")
except ValueError as error:
    assert "save needs the whole model in one process" in str(error)
"""


@pytest.fixture
def start():
    """Starts processes of a program, each with its rank, and ends those that are left."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    started = []

    def start(count, num_devices, command):
        environment = dict(
            os.environ,
            XLA_FLAGS=flags_with_devices(num_devices),
            PYTHONPATH=str(ROOT),
        )
        for rank in range(count):
            arguments = command(coordinator, rank)
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("count", "num_devices"),
    [
        (2, 2),
        pytest.param(2, 4, marks=slow),
        pytest.param(8, 1, marks=slow),
    ],
    ids=["2 processes of 2", "2 processes of 4", "8 processes of 1"],
)
def test_processes_agree_with_one_and_read_their_part(
    count, num_devices, start, nano, nano_path, nano_reference, tmp_path
):
    def command(coordinator, rank):
        program = (JOIN + COMPUTE).format(
            coordinator=coordinator,
            count=count,
            rank=rank,
            devices=count * num_devices,
            path=str(nano_path),
            reference=str(nano_path / "reference.npz"),
            output=str(tmp_path),
        )
        return ["-c", program]

    for process in start(count, num_devices, command):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    tokens = nano_reference["tokens"]
    logits = nano.logits(tokens)
    completions = nano.generate(
        [[1, 2, 3, 4], [5, 6, 7]], max_new_tokens=8, temperature=0, ignore_eos=True
    )
    for rank in range(count):
        found = np.load(tmp_path / f"{rank}.npz")
        assert len(found["logits"]) == (3 if count == 2 else 1)
        for row in found["logits"]:
            assert relative_error(row, logits) <= 2e-5
        assert found["greedy"].tolist() == [completion.tokens for completion in completions]
        assert found["read"] <= 1.1 * found["held"]


@slow
def test_run_prints_once_and_in_all_the_same(start, toy):
    def command(coordinator, rank):
        return [str(ROOT / "run.py"), "--json", "--max-new-tokens", "4", "--temperature", "0",
                "--prompt", "The", "--coordinator", coordinator, "--num-processes", "2",
                "--process-id", str(rank)]  # fmt: skip

    first, second = start(2, 1, command)
    output, errors = first.communicate(timeout=300)
    other_output, other_errors = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors + other_errors
    expected = toy.generate("The", max_new_tokens=4, temperature=0)
    assert json.loads(output)["tokens"] == expected.tokens
    assert other_output == ""
    assert "bundled toy" in errors
    assert "bundled toy" not in other_errors


@pytest.mark.parametrize("prepare", ["", "streams.prepare()"], ids=["library", "command"])
def test_what_gloo_writes_is_kept_from_the_output_and_what_python_writes_is_in_it(prepare):
    program = f"""
import os
from grok1.command import streams
from grok1.machine import processes
{prepare}
print("before")
processes._keep_stdout_for_python()
print("after")
os.write(1, b"of Gloo")
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "before\nafter\n"), found.stderr
    assert "of Gloo" in found.stderr


DISAGREE = """
import os, sys
rank, nano, other = {rank}, {nano!r}, {other!r}
if rank == 1:
    os.environ["GROK1_NATIVE"] = "0"
import numpy as np
import grok1
from grok1.ops.cpu import bindings
grok1.initialize_distributed({coordinator!r}, 2, rank)
assert bindings.is_available() == (rank == 0) or rank == 0
def attempt(call):
    try:
        call()
    except grok1.OtherProcessError as error:
        print(error)
    else:
        print("agreed")
def load(path=nano, **options):
    options = dict(mesh=(1, 2), dtype="float32", progress=False) | options
    return grok1.load(path, **options)
attempt(lambda: load(dtype=("float32", "bfloat16")[rank]))
attempt(lambda: load(mesh=((1, 2), (2, 1))[rank], cache_dtype=(None, "int8")[rank]))
attempt(lambda: load((nano, other)[rank]))
attempt(lambda: load(layers=(3, 4)[rank], embedding_dtype=("float32", "bfloat16")[rank]))
attempt(lambda: grok1.random_model(grok1.TOY, mesh=(1, 2), seed=rank))
model = load()
assert not bindings.is_available()
options = dict(max_new_tokens=3, temperature=0)
attempt(lambda: model.generate([1, 2, 3 + rank], **options))
attempt(lambda: model.generate([1, 2], **options | dict(max_new_tokens=3 + rank)))
attempt(lambda: model.generate([1, 2], seed=rank, allowed_tokens=[5, 6 + rank]))
attempt(lambda: model.logits([1, 2 + rank]))
attempt(lambda: model.score([1, 2, 3], window=2 + rank))
attempt(lambda: model.choose([1], [[2], [3 + rank]]))
attempt(lambda: model.trace([1, 2 + rank]))
attempt(lambda: model.logits([1, 2]) if rank else model.generate([1, 2]))
with model.intervene(grok1.AblateExperts(rank)) as changed:
    attempt(lambda: changed.logits([1, 2]))
with model.intervene(grok1.AddToResidual(np.full(64, 1.0 + rank), layers=1)) as changed:
    attempt(lambda: changed.logits([1, 2]))
try:
    load((nano, nano + "/absent")[rank])
except (grok1.OtherProcessError, grok1.CheckpointError) as error:
    print(error, file=sys.stderr)
print(model.logits(np.array([1, 2]) if rank else [1, 2]).argmax(axis=-1).tolist())
"""


def test_processes_that_would_not_do_the_same_are_told_how(start, nano, nano_path, copied):
    embedding = copied / "ckpt-0" / "tensor00000_000"
    data = bytearray(embedding.read_bytes())
    data[len(data) // 2] ^= 1
    embedding.write_bytes(data)

    def command(coordinator, rank):
        program = DISAGREE.format(
            coordinator=coordinator, rank=rank, nano=str(nano_path), other=str(copied)
        )  # fmt: skip
        return ["-c", program]

    outputs = []
    for process in start(2, 1, command):
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        outputs.append((output.splitlines(), errors))
    (said, errors), (other_said, other_errors) = outputs
    assert said == other_said
    assert "several times slower than the native kernels: process 1 has none" in errors
    assert "native kernels" not in other_errors
    # An error in one is an error in all.
    assert f"process 1 of 2 failed: CheckpointError: {nano_path}/absent" in errors
    assert f"{nano_path}/absent" in other_errors
    in_each = "{} is {} in process 0, {} in process 1"
    expected = [
        ("load", "dtype", "'float32'", "'bfloat16'"),
        ("load", "mesh", r"\[1, 2\]", r"\[2, 1\]"),
        ("load", "the checkpoint", "'[0-9a-f]{12}'", "'[0-9a-f]{12}'"),
        ("load", "num_layers", "3", "4"),
        ("random_model", "seed", "0", "1"),
        ("generate", "prompts", r"\[\[1, 2, 3\]\]", r"\[\[1, 2, 4\]\]"),
        ("generate", "max_new_tokens", "3", "4"),
        ("generate", "allowed_tokens", r"\[5, 6\]", r"\[5, 7\]"),
        ("logits", "tokens", r"\[1, 2\]", r"\[1, 3\]"),
        ("score", "window", "2", "3"),
        ("choose", "options", r"\[\[2\], \[3\]\]", r"\[\[2\], \[4\]\]"),
        ("trace", "the text", r"\[1, 2\]", r"\[1, 3\]"),
        None,
        ("logits", "interventions", ".*", ".*"),
        ("logits", "interventions", "sha256 .*", "sha256 .*"),
    ]
    *said, tokens = said
    for line, parts in zip(said, expected, strict=True):
        message = "^processes make different calls, generate in process 0, logits in process 1; all"
        if parts is not None:
            call, *rest = parts
            message = f"^processes disagree about {call}: .*{in_each.format(*rest)}"
        assert re.search(message, line), line
    # What two things differ in is said of both.
    assert "; cache_dtype is 'float32' in process 0, 'int8' in process 1. Give all" in said[1]
    assert "seed is 0 in process 0, 1 in process 1; allowed_tokens is" in said[7]
    assert json.loads(tokens) == nano.logits([1, 2]).argmax(axis=-1).tolist()


# Of the command; that all are told is held above.
@slow
def test_an_error_in_one_process_ends_the_command_in_all(start, tmp_path):
    def command(coordinator, rank):
        checkpoint = tmp_path if rank else ROOT / "checkpoints" / "toy"
        return [str(ROOT / "run.py"), "--coordinator", coordinator, "--num-processes", "2",
                "--process-id", str(rank), "--checkpoint", str(checkpoint)]  # fmt: skip

    first, second = start(2, 1, command)
    _, errors = first.communicate(timeout=60)
    _, other_errors = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (1, 1)
    cause = f"{tmp_path}: holds no weights"
    assert f"run.py: process 1 of 2 failed: CheckpointError: {cause}" in errors
    assert f"run.py: {cause}" in other_errors


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGKILL, marks=slow),
        pytest.param(0, signal.SIGKILL, marks=slow),
    ],
)
def test_the_death_of_one_process_ends_all(victim, how, start, nano_path):
    slow = (
        "import os, time, sys; preadv = os.preadv\n"
        "def slow(*arguments):\n"
        "    time.sleep(1)\n"
        "    return preadv(*arguments)\n"
        "os.preadv = slow\n"
        "from grok1.checkpoint import native; native.is_available = lambda: False\n"
        "from grok1.machine import processes; processes._HEARTBEAT_SECONDS = 5\n"
        + JOIN
        + "print('loading', flush=True)\n"
        + f"grok1.load({str(nano_path)!r})\n"
    )
    count = victim + 1 if victim else 3

    def command(coordinator, rank):
        program = slow.format(coordinator=coordinator, count=count, rank=rank)
        return ["-c", program]

    processes = start(count, 1, command)
    for process in processes:
        while process.stdout.readline() != "loading\n":
            assert process.poll() is None
    processes[victim].send_signal(how)
    killed = time.monotonic()
    assert processes[victim].wait(timeout=60) == -how
    # The service that notices who is silent is process 0's own.
    said = rf"unhealthy \(stopped sending heartbeats\):\n{victim}\n|task:{victim}"
    said = said if victim else "leader task"
    for rank in set(range(count)) - {victim}:
        _, errors = processes[rank].communicate(timeout=60)
        assert processes[rank].returncode != 0
        assert re.search(said, errors), errors
    assert time.monotonic() - killed < 60


def test_a_lone_process_needs_no_others(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert grok1.initialize_distributed() == 0
    with processes.together() as check:
        check()


@pytest.fixture
def joined(monkeypatch) -> list[tuple]:
    """Stands in for JAX's own joining; holds the arguments it was called with."""
    given = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *a, **k: given.append(a))
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return given


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
    ids=["slurm", "open mpi"],
)
def test_a_launcher_is_noticed(environment, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    grok1.initialize_distributed()
    grok1.initialize_distributed(local_device_ids=[0, 1])
    assert joined == [(None, None, None, None), (None, None, None, [0, 1])]


def test_the_address_in_the_environment_counts(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0:12345")
    grok1.initialize_distributed()
    assert joined == [("host0:12345", None, None, None)]


def test_a_lone_process_takes_the_gpus_it_is_told(joined, monkeypatch):
    found = {}
    monkeypatch.setattr(processes.jax.config, "update", found.__setitem__)
    assert grok1.initialize_distributed(local_device_ids=[2, 3]) == 0
    assert found == {"jax_cuda_visible_devices": "2,3", "jax_rocm_visible_devices": "2,3"}
    assert not joined


def test_run_passes_on_how_processes_meet(monkeypatch):
    given = []
    monkeypatch.setattr(
        processes, "initialize_distributed", lambda *a: given.append(a) or sys.exit()
    )
    arguments = ["run.py", "--coordinator", "h:1", "--process-id", "1", "--local-devices", "0,3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    assert given == [("h:1", None, 1, [0, 3])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host0", 2, 0), "coordinator must be HOST:PORT, .*, as host0:12345, found 'host0'"),
        (("host0:99999", 2, 0), "coordinator must be HOST:PORT"),
        (("host0:1", 0, 0), "num_processes must be 1 or more, found 0"),
        (("host0:1", 2, 2), "process_id must be from 0 to num_processes - 1, found 2 with num_pr"),
        (("host0:1", 2, -1), "process_id must be from 0 to num_processes - 1, found -1"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(arguments, message, joined):
    with pytest.raises(ValueError, match=message):
        grok1.initialize_distributed(*arguments)
    assert not joined


def test_a_coordinator_that_does_not_answer_is_an_error(joined, monkeypatch):
    monkeypatch.setattr(processes, "_START_SECONDS", 0.1)
    monkeypatch.setattr(processes, "_RETRY_SECONDS", 0.01)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=rf"{coordinator}: does not answer after 0.1 s: "):
            grok1.initialize_distributed(coordinator, 2, 1)
        assert not joined
        probe.listen()
        grok1.initialize_distributed(coordinator, 2, 1)
        assert joined == [(coordinator, 2, 1, None)]


def test_without_the_number_of_processes_no_coordinator_is_waited_for(joined, monkeypatch):
    monkeypatch.setattr(processes, "_START_SECONDS", 0.1)
    grok1.initialize_distributed("localhost:1", None, 1)
    assert joined == [("localhost:1", None, 1, None)]
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="does not answer"):
        grok1.initialize_distributed("localhost:1", None, 1)


@pytest.mark.parametrize(("index", "speaks"), [(0, True), (1, False)])
def test_of_several_processes_one_speaks(index, speaks, monkeypatch):
    assert processes.is_first()
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.jax, "process_index", lambda: index)
    assert processes.is_first() is speaks


def test_half_of_the_arguments_is_an_error():
    program = (
        "import grok1\n"
        "try:\n    grok1.initialize_distributed('localhost:1', 2)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "coordinator=localhost:1, num_processes=2 and process_id=None, and" in result.stdout
    assert result.stdout.rstrip().endswith("Give all three")
