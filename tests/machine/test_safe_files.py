"""Writing where someone else was first: no link is followed, no file is replaced unasked."""

import errno
import os
import pathlib
import secrets

import pytest

from grok1.machine import safe_files
from grok1.machine.safe_files import creating, is_own_directory, move_new, replacing


def write(how, path: pathlib.Path, data: bytes = b"new") -> None:
    with how(path) as file:
        file.write(data)


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "place").symlink_to(tmp_path / "mine")
    write(replacing, tmp_path / "place")
    assert (tmp_path / "mine").read_bytes() == b"precious"
    assert not (tmp_path / "place").is_symlink()
    assert (tmp_path / "place").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["mine", "place"]


@pytest.mark.parametrize("how", [replacing, creating])
def test_a_name_that_somebody_has_guessed_is_not_written_to(how, tmp_path, monkeypatch):
    (tmp_path / "mine").write_bytes(b"precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".place.partial-guessed").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write(how, tmp_path / "place")
    assert (tmp_path / "mine").read_bytes() == b"precious"
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("before", ["a file", "a link", "a link that leads nowhere"])
def test_what_is_there_is_not_replaced(before, tmp_path):
    place = tmp_path / "place"
    (tmp_path / "mine").write_bytes(b"precious")
    if before == "a file":
        place.write_bytes(b"old")
    else:
        place.symlink_to(tmp_path / ("mine" if before == "a link" else "absent"))
    with pytest.raises(FileExistsError, match="place"):
        write(creating, place)
    assert (tmp_path / "mine").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["mine", "place"]


@pytest.mark.parametrize("links", [True, False])
def test_what_comes_meanwhile_is_not_replaced(links, tmp_path, monkeypatch):
    if not links:

        def refuse(*arguments, **options):
            raise OSError(errno.EPERM, "no links on this file system")

        monkeypatch.setattr(os, "link", refuse)

    def race():
        with creating(tmp_path / "place") as file:
            file.write(b"new")
            (tmp_path / "place").write_bytes(b"old")

    with pytest.raises(FileExistsError):
        race()
    assert (tmp_path / "place").read_bytes() == b"old"
    (tmp_path / "place").unlink()
    write(creating, tmp_path / "place")
    assert (tmp_path / "place").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("how", [replacing, creating])
def test_an_error_leaves_nothing(how, tmp_path):
    def stop_half_way():
        with how(tmp_path / "place") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert not os.listdir(tmp_path)


def test_what_is_written_is_as_open_as_any_other_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write(replacing, tmp_path / "one")
    write(creating, tmp_path / "two")
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "one", "two")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("new", "here/new"),
        ("./new/", "here/new"),
        ("../new", "new"),
        ("link/../new", "far/new"),
        ("absent/../new", "here/new"),
        ("../here/link/new", "far/away/new"),
        ("../here/link", "here/link"),
        ("link/..", "far"),
    ],
)
def test_a_path_leads_where_the_system_goes(tmp_path, monkeypatch, path, expected):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path / "here")
    assert safe_files.absolute(path) == tmp_path / expected


def test_a_file_behind_a_link_and_back_is_written_where_the_system_looks(tmp_path, monkeypatch):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    for number, kind in enumerate((replacing, creating)):
        write(kind, f"link/../{number}")
        assert os.path.exists(f"link/../{number}")
        assert not os.path.exists(str(number))


def test_a_directory_moves_to_where_nothing_is(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "empty").mkdir()
    move_new(tmp_path / "one", tmp_path / "empty")
    assert (tmp_path / "empty" / "file").read_text() == "one"
    (tmp_path / "link").symlink_to(tmp_path / "three")
    for place in ("empty", "link"):
        with pytest.raises(FileExistsError):
            move_new(tmp_path / "two", tmp_path / place)
    assert (tmp_path / "three" / "file").read_text() == "three"


def test_a_scratch_directory_is_private_and_goes(tmp_path):
    with safe_files.scratch_directory(tmp_path / "absent" / "model") as first:
        with safe_files.scratch_directory(tmp_path / "absent" / "model") as second:
            assert first != second
            assert first.parent == second.parent == tmp_path
        assert first.stat().st_mode & 0o777 == 0o700
        assert is_own_directory(first)
        (first / "file").write_text("")
    assert not os.listdir(tmp_path)


def test_a_directory_that_others_may_enter_or_a_link_is_not_ours_alone(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    (tmp_path / "file").write_text("")
    found = [is_own_directory(tmp_path / name) for name in ("private", "open", "link", "file", "x")]
    assert found == [True, False, False, False, False]


def test_a_file_with_another_name_or_a_link_is_not_opened(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "soft").symlink_to(tmp_path / "mine")
    (tmp_path / "hard").hardlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("soft", "hard", "pipe"):
        with pytest.raises(OSError, match=r"links|one name"):
            safe_files.open_plain(tmp_path / name, os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\x1b[31m", "\ud800", "a\u2028b", "\x7f"])
def test_a_name_with_controls_is_not_plain(name):
    assert not safe_files.is_plain(name)
    assert safe_files.is_plain("model-00001-of-00002.safetensors")
    assert safe_files.is_plain("Modèle\u00a0日本")
