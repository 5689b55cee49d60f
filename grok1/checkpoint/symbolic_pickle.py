"""Pickles as notes of what they would make: read without making it, written without having it.

Unpickling imports and calls whatever a file names. The machine here runs the opcodes on notes
instead: a call becomes an `Object` that says what would be called with what. Nothing is imported or
called, byte strings are skipped instead of read, and the work is bounded. Only the opcodes exist
that CPython's protocol 4 spends on an object holding arrays; every other one is refused, as is
every global outside the caller's list. Written pickles are CPython's, byte for byte.

Opcodes: Python's `pickletools`. Frames: PEP 3154.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NoReturn

_MAX_OPCODES = 512
_FRAME_TARGET = 1 << 16  # CPython ends a frame here, and keeps longer byte strings out of frames.


@dataclasses.dataclass(eq=False)
class PickleRefusedError(Exception):
    """A file is no pickle of the kind expected.

    Attributes:
      offset: Byte in the file where that shows.
      problem: What was found and what was expected.
      hostile: Whether the file asks for what no valid file needs, rather than being damaged.
    """

    offset: int
    problem: str
    hostile: bool = False


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in a module; nothing is imported."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A byte string: where it lies in the file, and its content if it is short and known."""

    offset: int
    length: int
    content: bytes = b""


@dataclasses.dataclass(eq=False)
class Object:
    """What `function(*args)` would make by an opcode, REDUCE or NEWOBJ, and its state by BUILD."""

    opcode: str
    function: Any
    args: Any
    state: Any = None
    offset: int = 0


def describe(note: Any, depth: int = 1) -> str:
    """Names a note for a message, in bounded space: a hostile file nests tuples at will."""
    match note:
        case Global():
            return f"{describe(note.module, 0)}.{describe(note.name, 0)}".replace("'", "")
        case Object():
            return "an object"
        case Bytes():
            return f"{note.length} bytes"
        case tuple():
            items = [describe(item, depth - 1) for item in note[:9]] if depth else ["..."]
            return f"({', '.join(items)})"
        case dict():
            return f"a dictionary of {[*note][:9]!a}"
    return ascii(note)


def read_notes(file: BinaryIO, size: int, allowed: Sequence[Global]) -> Any:
    """Runs a pickle on notes.

    Args:
      file: Open at its first byte; must support `seek`.
      size: Its length in bytes, which the pickle must fill.
      allowed: The only globals that the pickle may name.

    Returns:
      The note of the pickled object: None, bool, int, str, `Bytes`, `Global`, `Object`, or a tuple
      or a dictionary (with strings as keys) of these.

    Raises:
      PickleRefusedError: At the first byte that a valid file cannot have.
    """
    return _Machine(file, size, allowed).run()


class _Machine:
    def __init__(self, file: BinaryIO, size: int, allowed: Sequence[Global]):
        self.file, self.size, self.allowed = file, size, allowed
        self.position = 2  # Of the next byte to read.
        self.offset = 0  # Of the opcode in hand.
        self.opcode = ""
        self.frame_end = 0
        self.limit = size  # Where the opcode in hand must end: with its frame, or the file.
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []  # One for each open MARK.
        self.memo: list[Any] = []

    def run(self) -> Any:
        start = self.file.read(16)
        if start[:2] != b"\x80\x04":
            self.refuse(
                f"the file starts with {start!r}, expected b'\\x80\\x04', pickle protocol 4"
            )
        self.file.seek(self.position)
        for _ in range(_MAX_OPCODES):
            self.offset, self.opcode = self.position, "an opcode"
            self.limit = self.frame_end if self.position < self.frame_end else self.size
            code = self.take(1)
            if code == b".":
                return self.result()
            if code not in _OPCODES:
                self.refuse_opcode(code)
            self.opcode, action = _OPCODES[code]
            try:
                action(self)
            except (IndexError, ValueError) as error:
                self.refuse(f"{self.opcode} has no valid operand ({error})")
        self.refuse(f"no end after {_MAX_OPCODES} opcodes, expected about 120")

    def result(self) -> Any:
        found = (self.size - self.position, len(self.stack), len(self.outer_stacks))
        if found != (0, 1, 0):
            self.refuse(
                "the pickle ends {} bytes early with {} objects and {} open marks, expected 0, 1 "
                "and 0".format(*found)
            )
        return self.stack[0]

    def refuse(self, problem: str, *, hostile: bool = False) -> NoReturn:
        raise PickleRefusedError(self.offset, problem, hostile)

    def refuse_opcode(self, code: bytes) -> NoReturn:
        if code in (b"c", b"i"):
            lines = [self.file.readline(256).decode("latin-1").strip() for _ in range(2)]
            self.refuse_global(Global(*lines))
        name = _FORBIDDEN.get(code, "opcode")
        self.refuse(f"{name} ({code!r}), which no valid file uses", hostile=True)

    def refuse_global(self, found: Global) -> NoReturn:
        allowed = ", ".join(map(describe, self.allowed))
        self.refuse(f"the pickle names {describe(found)}, expected only {allowed}", hostile=True)

    def skip(self, count: int) -> None:
        if count > self.limit - self.position:
            self.refuse(
                f"the {'file' if self.limit == self.size else 'frame'} ends at byte {self.limit}, "
                f"expected {count} bytes for {self.opcode} at byte {self.position}"
            )
        self.position += count

    def take(self, count: int) -> bytes:
        if count > self.limit - self.position:
            self.skip(count)  # which refuses it
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            self.refuse("the file became shorter while it was read")
        return data

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> str:
        return self.take(self.unsigned(1)).decode("utf-8")

    def byte_string(self, width: int) -> Bytes:
        length, start = self.unsigned(width), self.position
        content = self.take(1) if length == 1 else b""
        self.skip(length - len(content))
        self.file.seek(self.position)
        return Bytes(start, length, content)

    def frame(self) -> None:
        length, left = self.unsigned(8), self.size - self.position
        if self.offset < self.frame_end or length > left:
            self.refuse(
                f"a frame of {length} bytes, expected none inside a frame and at most the {left} "
                "bytes left"
            )
        self.frame_end = self.position + length

    def pop_tuple(self, count: int) -> tuple:
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def named(self) -> Global:
        found = Global(*self.pop_tuple(2))
        # Compared, never hashed: hashing a hostile tuple of tuples takes exponential time.
        if found not in self.allowed:
            self.refuse_global(found)
        return found

    def create(self) -> Object:
        return Object(self.opcode, *self.pop_tuple(2), offset=self.offset)

    def set_items(self) -> None:
        items, target = self.pop_to_mark(), self.stack[-1]
        if not isinstance(target, dict):
            self.refuse(f"SETITEMS on {describe(target)}, expected a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                self.refuse(f"key {describe(key)}, expected a string that is not yet a key")
            target[key] = value

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Object) or target.state is not None:
            self.refuse(f"BUILD on {describe(target)}, expected an object without state")
        target.state = state


def _push(note: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def action(machine: _Machine) -> None:
        value = note(machine)  # First: TUPLE goes back to an outer stack.
        machine.stack.append(value)

    return action


_OPCODES: dict[bytes, tuple[str, Callable[[_Machine], None]]] = {
    b"\x95": ("FRAME", _Machine.frame),
    b"(": ("MARK", _Machine.mark),
    b"\x94": ("MEMOIZE", lambda m: m.memo.append(m.stack[-1])),
    b"h": ("BINGET", _push(lambda m: m.memo[m.unsigned(1)])),
    b"N": ("NONE", _push(lambda m: None)),
    b"\x88": ("NEWTRUE", _push(lambda m: True)),
    b"\x89": ("NEWFALSE", _push(lambda m: False)),
    b"K": ("BININT1", _push(lambda m: m.unsigned(1))),
    b"M": ("BININT2", _push(lambda m: m.unsigned(2))),
    b"J": ("BININT", _push(lambda m: int.from_bytes(m.take(4), "little", signed=True))),
    b"\x8c": ("SHORT_BINUNICODE", _push(_Machine.text)),
    b"C": ("SHORT_BINBYTES", _push(lambda m: m.byte_string(1))),
    b"B": ("BINBYTES", _push(lambda m: m.byte_string(4))),
    b"\x8e": ("BINBYTES8", _push(lambda m: m.byte_string(8))),
    b")": ("EMPTY_TUPLE", _push(lambda m: ())),
    b"\x85": ("TUPLE1", _push(lambda m: m.pop_tuple(1))),
    b"\x86": ("TUPLE2", _push(lambda m: m.pop_tuple(2))),
    b"\x87": ("TUPLE3", _push(lambda m: m.pop_tuple(3))),
    b"t": ("TUPLE", _push(lambda m: tuple(m.pop_to_mark()))),
    b"}": ("EMPTY_DICT", _push(lambda m: {})),
    b"u": ("SETITEMS", _Machine.set_items),
    b"\x93": ("STACK_GLOBAL", _push(_Machine.named)),
    b"R": ("REDUCE", _push(_Machine.create)),
    b"\x81": ("NEWOBJ", _push(_Machine.create)),
    b"b": ("BUILD", _Machine.build),
}
# Opcodes that call, or fetch from outside the file; GLOBAL and INST are refused by what they name.
_FORBIDDEN = {
    b"o": "OBJ",
    b"P": "PERSID",
    b"Q": "BINPERSID",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"\x92": "NEWOBJ_EX",
    b"\x97": "NEXT_BUFFER",
}


def write_notes(root: Object) -> list[bytes | int]:
    """Returns the protocol 4 pickle that CPython writes of an object.

    Args:
      root: The note of the object. Equal strings, globals and `Bytes` with content are taken to be
        one object each, as they are where NumPy pickles an array; all else to be distinct.

    Returns:
      The bytes of the file in order; each `Bytes` without content is its length instead.
    """
    writer = _Writer()
    writer.save(root)
    writer.emit(b".")
    writer.end_frame()
    return writer.pieces


class _Writer:
    def __init__(self):
        self.pieces: list[bytes | int] = [b"\x80\x04"]
        self.frame: list[bytes | int] = []
        self.frame_length = 0
        self.memo: dict[Any, int] = {}

    def emit(self, piece: bytes | int) -> None:
        self.frame.append(piece)
        self.frame_length += piece if isinstance(piece, int) else len(piece)

    def end_frame(self) -> None:
        self.pieces += [b"\x95" + self.frame_length.to_bytes(8, "little"), *self.frame]
        self.frame, self.frame_length = [], 0

    def memoize(self, key: Any = None) -> None:
        """Numbers the last value; only one with a key is found again."""
        self.memo[object() if key is None else key] = len(self.memo)
        self.emit(b"\x94")

    def save(self, note: Any) -> None:
        if self.frame_length >= _FRAME_TARGET:
            self.end_frame()
        if isinstance(note, str | Global | Bytes) and note in self.memo:
            self.emit(b"h" + bytes([self.memo[note]]))
            return
        match note:
            case None:
                self.emit(b"N")
            case bool():
                self.emit(b"\x88" if note else b"\x89")
            case int():
                self.emit(_integer(note))
            case str():
                self.emit(b"\x8c" + bytes([len(note.encode())]) + note.encode())
                self.memoize(note)
            case Bytes():
                self.byte_string(note)
            case Global():
                self.save(note.module)
                self.save(note.name)
                self.emit(b"\x93")
                self.memoize(note)
            case tuple():
                self.sequence(note)
            case dict():
                self.emit(b"}")
                self.memoize()
                self.emit(b"(")
                for item in itertools.chain(*note.items()):
                    self.save(item)
                self.emit(b"u")
            case Object():
                self.save(note.function)
                self.save(note.args)
                self.emit(b"R" if note.opcode == "REDUCE" else b"\x81")
                self.memoize()
                self.save(note.state)
                self.emit(b"b")

    def byte_string(self, note: Bytes) -> None:
        opcode, width = b"C", 1
        if note.length >= 1 << 8:
            opcode, width = (b"B", 4) if note.length < 1 << 32 else (b"\x8e", 8)
        header = opcode + note.length.to_bytes(width, "little")
        if note.length < _FRAME_TARGET:
            self.emit(header)
            self.emit(note.content or note.length)
        else:
            self.end_frame()
            self.pieces += [header, note.length]
        self.memoize(note if note.content else None)

    def sequence(self, note: tuple) -> None:
        if not note:
            self.emit(b")")
            return
        if len(note) > 3:
            self.emit(b"(")
        for item in note:
            self.save(item)
        self.emit({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(note), b"t"))
        self.memoize()


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little", signed=True)
