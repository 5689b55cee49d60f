"""Programs compiled once for all processes; nobody else's directory, no stale or damaged file."""

import hashlib
import json
import os
import pathlib
import pickle
import shutil
import stat
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache

import grok1
from grok1.engine import compilation
from grok1.engine.compilation import Program
from grok1.engine.engine import Engine
from grok1.machine import announcement, cache_directory
from grok1.machine.announcement import announced
from grok1.nn.capture import as_capture
from grok1.ops.cpu import bindings


@pytest.fixture
def tests_own_cache():
    bindings.is_available()
    return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "grok1"


@pytest.fixture
def monkeypatch(stored_programs):
    """Pytest's own: here programs are stored whatever they are made of."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GROK1_COMPILATION_CACHE")
    # A busy machine is not what these tests are about.
    monkeypatch.setattr(announcement, "PATIENCE", 1000.0)
    announcement.hint.cache_clear()
    # One that the user has chosen for JAX would take its place.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    chosen = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    # JAX looks at the setting once.
    monkeypatch.setattr(compilation_cache, "is_cache_used", lambda backend: False)
    yield tmp_path / "grok1"
    jax.config.update("jax_compilation_cache_dir", chosen)


@pytest.fixture
def compiled(monkeypatch):
    """Names of what JAX traced or compiled, as it goes."""
    events = []

    def listen(event, duration, **_):
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def twice(identity: str | None = "twice") -> Program:
    jitted = jax.jit(lambda x: x * 2, donate_argnums=0)
    return Program(jitted, jax.devices()[:1], identity, lambda x: f"twice {len(x)}")


def stored(cache):
    return sorted(cache.glob("program-*"))


PROCESS = """
import json, sys, jax, grok1
durations = {}
def listen(event, duration, **_):
    name = event.removeprefix("/jax/core/compile/")
    durations[name] = durations.get(name, 0) + duration
model = grok1.load(sys.argv[1], mesh=(1, 2), progress=False)
engine = model.engine
jax.monitoring.register_event_duration_secs_listener(listen)
def timed(function):
    def run(self, *args, **kwargs):
        durations.clear()
        result = jax.block_until_ready(function(self, *args, **kwargs))
        total.append(dict(durations))
        return result
    return run
total = []
for name in ("new_state", "prefill", "decode"):
    setattr(type(engine), name, timed(getattr(type(engine), name)))
tokens = model.generate(list(range(9)), max_new_tokens=3, ignore_eos=True).tokens
print(json.dumps([tokens, total]))
"""


@pytest.mark.devices(2)
def test_a_later_process_neither_traces_nor_compiles(tests_own_cache, cache, nano_path):
    cache.mkdir(mode=0o700)
    for kernels in tests_own_cache.glob("native-*"):
        shutil.copy(kernels, cache)
    outputs, files = [], []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROCESS, str(nano_path)],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(json.loads(result.stdout))
        files.append({path: path.read_bytes() for path in stored(cache)})
    (tokens, first), (tokens_again, second) = outputs
    assert all(first[step]["backend_compile_duration"] > 0 for step in (0, 1, 2))
    assert second == [{}] * len(first)
    assert tokens == tokens_again
    assert files[0] == files[1]
    assert len(files[0]) == 4
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_stored_program_is_the_same_and_still_consumes_its_argument(cache, compiled):
    expected = twice()(jnp.arange(4.0))
    assert len(stored(cache)) == 1
    x = jax.block_until_ready(jnp.arange(4.0))
    compiled.clear()
    program = twice()
    out = program(x)
    assert compiled == []
    assert out.tolist() == expected.tolist() == [0, 2, 4, 6]
    assert x.is_deleted()
    assert len(program.executables) == 1


def test_every_shape_and_type_is_a_program_of_its_own(cache):
    program = twice()
    for x in (np.zeros(2, np.float32), np.zeros(3, np.float32), np.zeros(3, np.int32)):
        assert program(x).shape == x.shape
        assert program(x).dtype == x.dtype
    assert len(program.executables) == len(stored(cache)) == 3


@pytest.mark.devices(2)
def test_what_the_machine_code_depends_on_is_told_apart(cache, monkeypatch):
    x = np.zeros(2, np.float32)
    twice()(x)
    twice("another")(x)
    with jax.default_matmul_precision("float32"):
        twice()(x)
    for name, value in [
        ("instructions", lambda: "another"),
        ("schedulable_cores", lambda: 1000),
        ("source_hash", lambda: "another"),
        ("platform", type("", (), {"python_version": lambda: "2.7"})),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(compilation, name, value)
            twice()(x)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_dump_to=")
    twice()(x)
    for name, value in [("GROK1_NUM_THREADS", "1"), ("GROK1_CUDA_GRAPHS", "unrolled")]:
        monkeypatch.setenv(name, value)
        twice()(x)
    on_another_device = Program(jax.jit(lambda x: x * 2), jax.devices()[1:2], "twice", str)
    on_another_device(jax.device_put(x, jax.devices()[1]))
    assert len(stored(cache)) == 11


def test_a_cache_of_another_type_is_another_program(cache, nano):
    for dtype in ("float32", "float16", "int8"):
        engine = Engine(nano.params, nano.config, nano.mesh, nano.dtype, dtype)
        state = engine.new_state(np.zeros((1, 256), np.int32))
        assert state.cache.k.dtype == dtype


def with_digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
        lambda data: with_digest(b""),
        lambda data: with_digest(pickle.dumps((b"no executable", None, None))),
        lambda data: with_digest(data[32:].replace(b"twice", b"thric")[:-1000]),
    ],
    ids=["empty", "truncated", "flipped", "nothing", "foreign", "truncated before the hash"],
)
def test_a_damaged_file_is_compiled_anew_and_replaced(cache, capfd, damage):
    twice()(np.zeros(2, np.float32))
    (path,) = stored(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert twice()(np.ones(2, np.float32)).tolist() == [2, 2]
    assert stored(cache) == [path]
    assert path.stat().st_size >= len(whole) // 2 + 1
    assert compilation._read(path.name, jax.devices()[:1]) is not None
    assert capfd.readouterr().err == ""


def test_off_by_the_environment(cache, monkeypatch, capfd):
    monkeypatch.setenv("GROK1_COMPILATION_CACHE", "0")
    assert twice()(np.ones(1, np.float32)).tolist() == [2]
    assert not cache.exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_compilation_cache_dir", "chosen"), ("jax_enable_compilation_cache", False)],
)
def test_a_cache_that_the_user_chose_for_jax_goes_first(cache, name, value):
    before = jax.config.values[name]
    assert compilation._are_stored()
    jax.config.update(name, value)
    try:
        assert not compilation._are_stored()
    finally:
        jax.config.update(name, before)


def test_a_function_of_the_users_is_not_stored(cache, nano):
    engine = Engine(nano.params, nano.config, nano.mesh, nano.dtype)
    engine.decode_program(None, lambda logits, tokens, length: logits)
    engine.decode_program(None, None)
    identities = {key: program._identity for key, program in engine._programs.held.items()}
    assert [identity is None for identity in identities.values()] == [True, False]
    twice(None)(np.zeros(1, np.float32))
    assert not cache.exists()


def test_the_least_recently_used_give_way(cache, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_STORED", 2)
    long_ago = time.time() - 100
    for size in (1, 2):
        twice()(np.zeros(size, np.float32))
        (new,) = (path for path in stored(cache) if path.stat().st_mtime > long_ago + 50)
        os.utime(new, (long_ago + size, long_ago + size))
    oldest, newer = sorted(stored(cache), key=lambda path: path.stat().st_mtime)
    twice()(np.zeros(1, np.float32))  # used, so no longer the oldest
    twice()(np.zeros(3, np.float32))
    assert len(stored(cache)) == 2
    assert oldest in stored(cache)
    assert newer not in stored(cache)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A package of one file, which is dated in the future, and has just been imported."""
    package = tmp_path / "package"
    package.mkdir()
    file = package / "module.py"
    file.write_text("text")
    later = time.time() + 1e6
    os.utime(file, (later, later))
    monkeypatch.setattr(compilation, "_PACKAGE", package)
    monkeypatch.setattr(compilation, "_IMPORTED", compilation._sources())
    return package


def test_a_file_dated_in_the_future_is_no_reason_not_to_store(cache, sources, monkeypatch):
    found = compilation.source_hash.__wrapped__()
    assert len(found) == 64
    os.utime(sources / "module.py", (0, 0))
    monkeypatch.setattr(compilation, "_IMPORTED", compilation._sources())
    assert compilation.source_hash.__wrapped__() == found


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "module.py").write_text("test"),
        lambda package: os.utime(package / "module.py", (0, 0)),
        lambda package: (package / "another.py").write_text(""),
        lambda package: (package / "module.py").unlink(),
    ],
    ids=["content", "date", "new", "gone"],
)
def test_nothing_is_stored_once_the_sources_have_changed_under_the_process(
    cache, sources, monkeypatch, change
):
    change(sources)
    assert compilation.source_hash.__wrapped__() is None
    monkeypatch.setattr(compilation, "source_hash", lambda: None)
    twice()(np.zeros(1, np.float32))
    assert not cache.exists()


# --- a directory that will not do ---------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o755])
def test_a_directory_open_to_others_is_neither_read_nor_written(cache, capfd, mode):
    twice()(np.zeros(1, np.float32))
    before = stored(cache)
    cache.chmod(mode)
    for size in (1, 2):
        assert twice()(np.ones(size, np.float32)).tolist() == [2] * size
    assert stored(cache) == before
    assert capfd.readouterr().err == (
        "grok1: every process compiles anew, nothing is cached: "
        f"{cache} is not private; make it a directory of yours, mode 700\n"
    )


def test_a_directory_that_cannot_be_made(cache, capfd):
    cache.write_text("a file")
    for size in (1, 2):
        assert twice()(np.ones(size, np.float32)).tolist() == [2] * size
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("grok1: every process compiles anew, nothing is cached: ")
    assert str(cache) in line


def test_a_full_disk_is_no_error(cache, monkeypatch, capfd):
    def fail(self, name, data):
        raise OSError(28, "No space left on device", name)

    monkeypatch.setattr(cache_directory.PrivateDirectory, "write", fail)
    assert twice()(np.ones(1, np.float32)).tolist() == [2]
    assert "No space left on device" in capfd.readouterr().err


# --- what takes long ----------------------------------------------------------------------------


def test_slow_work_is_announced_while_it_goes_on(monkeypatch, capfd):
    monkeypatch.setattr(announcement, "PATIENCE", 0.01)
    with announced("making tea"):
        time.sleep(0.2)
        assert capfd.readouterr() == ("", "grok1: making tea ...")
    end = capfd.readouterr().err
    assert end == f" done in {end[9:12]} s\n"
    assert float(end[9:12]) >= 0.2


def test_quick_work_goes_unsaid(monkeypatch, capfd):
    assert announcement.PATIENCE == 2
    monkeypatch.setattr(announcement, "PATIENCE", 1000.0)
    with announced("making tea"):
        pass
    assert capfd.readouterr().err == ""


def test_work_that_fails_ends_its_line(monkeypatch, capfd):
    monkeypatch.setattr(announcement, "PATIENCE", 0.01)

    @announced("making tea")
    def interrupted():
        time.sleep(0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capfd.readouterr().err.startswith("grok1: making tea ... stopped after 0.")


def test_only_the_first_process_speaks(monkeypatch, capfd):
    monkeypatch.setattr(announcement, "PATIENCE", 0.01)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with announced("making tea"):
        time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_the_models_programs_are_named_in_words(cache, nano, monkeypatch, capfd):
    def run():
        engine = Engine(nano.params, nano.config, nano.mesh, nano.dtype)
        state = engine.new_state(np.zeros((2, 256), np.int32))
        state = engine.prefill(state, np.array([3, 2], np.int32), 16)
        engine.score(state, np.array([3, 2], np.int32), 16)
        return capfd.readouterr().err

    monkeypatch.setattr(announcement, "PATIENCE", 0.0)
    lines = run().splitlines()
    assert [line.split(" ... done in ")[0] for line in lines if "empty" not in line] == [
        f"grok1: compiling {name} of 16 tokens for batch 2, cache 256 "
        "(once; later runs take it from the cache)"
        for name in ("prefill", "scoring")
    ]
    assert run() == ""


def test_no_two_programs_are_announced_in_the_same_words(nano):
    def colder(logits, tokens, length):
        return logits * 2

    engine = Engine(nano.params, nano.config, nano.mesh, nano.dtype)
    capture = as_capture(("residual", "router_probs"))
    observed = engine.observed(capture, 256, lambda count, captured: None)
    with (
        nano.intervene(grok1.AblateExperts(3)) as ablated,
        nano.intervene(grok1.ScaleHeads(7, 0.0)) as scaled,
    ):
        programs = [
            engine.decode_program(None, None),
            engine.decode_program(0, None),
            engine.decode_program(5, None),
            engine.decode_program(None, colder),
            observed.decode_program(None, None),
            ablated.engine.decode_program(None, None),
            scaled.engine.decode_program(None, None),
            engine.prefill_program(16),
            engine.prefill_program(64),
            observed.prefill_program(64),
            engine.score_program(16, ()),
            engine.score_program(16, ("residual",)),
            engine.token_score_program(16, 5),
        ]
    state = engine.abstract_state(2, 256)
    words = [program._in_words(None, state) for program in programs]
    assert len(set(words)) == len(words)
    assert words[:6] == [
        "sampled decode for batch 2, cache 256",
        "sampled decode for batch 2, cache 256, with log-probabilities",
        "sampled decode for batch 2, cache 256, with log-probabilities and 5 alternatives",
        "sampled decode for batch 2, cache 256, with the logits_processor colder",
        "sampled decode for batch 2, cache 256, capturing residual and router_probs",
        "sampled decode for batch 2, cache 256, under AblateExperts(experts=3)",
    ]
    if engine.screening_table is not None:
        greedy = engine.greedy_program()._in_words(None, state)
        assert greedy == "greedy decode for batch 2, cache 256"
