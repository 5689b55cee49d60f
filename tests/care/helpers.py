"""What several modules of this room need."""

import contextlib
import pathlib

import pytest

from grok1.care import staging, verification
from grok1.care.conversion import convert
from tests.conftest import TOY


def tree(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def staging_of(target: pathlib.Path) -> pathlib.Path | None:
    """The directory in which a target is put together."""
    return next(target.parent.glob(f".{target.name}.partial-*"), None)


def journal_of(target: pathlib.Path) -> bytes:
    staging = staging_of(target)
    with contextlib.suppress(FileNotFoundError):
        return (staging / "journal").read_bytes() if staging else b""
    return b""


def interrupted(target: pathlib.Path, num_pieces: int, to: str = "grok1") -> pathlib.Path:
    """Converts the toy as far as some pieces and returns the directory that is left."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, num_pieces)
        with pytest.raises(KeyboardInterrupt):
            convert(TOY, target, to=to, progress=False)
    staging = staging_of(target)
    assert staging is not None
    return staging


def released(directory: pathlib.Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(directory).items() if name.startswith("ckpt-0")}


def interrupt_after(monkeypatch, num_pieces: int, error: BaseException | None = None):
    whole, count = staging._write_piece, iter(range(num_pieces))

    def write(*arguments):
        if next(count, None) is None:
            raise error or KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(staging, "_write_piece", write)


def faults_of(directory, **options) -> dict[str, str]:
    report = verification.verify(directory, progress=False, **options)
    assert len({fault.path for fault in report.faults}) == len(report.faults)
    return {fault.path: f"{fault.problem}; {fault.remedy}" for fault in report.faults}


def rewrite_header(path: pathlib.Path, change_text) -> None:
    """Changes the header of a shard and leaves its tensors where they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change_text(data[8 : 8 + length])
    assert text != data[8 : 8 + length]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
