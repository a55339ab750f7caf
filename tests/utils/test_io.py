"""Text files as people's systems write them; files and folders whole or as before; errors on a line."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from locatvit_hf.utils.console import hide_credentials
from locatvit_hf.utils.io import (
    atomic_directory,
    atomic_write,
    claim_folder,
    fitting_name,
    one_line,
    read_json,
    read_text,
    remove,
    sha256,
    write_json,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    path = tmp_path / "names.json"
    path.write_text('{"0": "ä"}\r\n', encoding=encoding, newline="")
    assert read_text(path) == '{"0": "ä"}\r\n' and read_json(path) == {"0": "ä"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{"0": "a"}'.encode("utf-16"),
            "names.json is in UTF-16, as some Windows programs write it: save it",
        ),
        ('{"0": "a"}'.encode("utf-16-le"), "names.json is in UTF-16"),
        (b'{"0": "\xe4"}', "names.json is not in UTF-8 (byte 0xe4 at 7): save it as UTF-8."),
        (b'{"0": "a",}', "names.json is not JSON: "),
        (b"[" * 100_000, "names.json is not JSON that can be read: it is nested too deeply."),
    ],
)
def test_other_encodings_are_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "card.md"
    atomic_write(path, lambda temporary: temporary.write_text("whole"))

    def fail(temporary):
        assert temporary.suffix == ".md" and path.read_text() == "whole"
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("two\n  lines."), "two lines"), (KeyError(), "KeyError"), (OSError("..."), "OSError")],
)
def test_error_fits_on_a_line(error, line):
    assert one_line(error) == line


@pytest.mark.parametrize("stem", ["a" * 251, "ä" * 200, "short"])
def test_names_fit_and_differ(tmp_path, stem):
    """Of any length, in bytes; the temporary file beside the whole one too."""
    names = {fitting_name(stem, ending) for ending in (".png", "-components.png")} | {fitting_name(f"{stem}b", ".png")}
    for name in names:
        atomic_write(tmp_path / name, lambda temporary: temporary.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == names and len(names) == 3
    assert fitting_name("short", ".png") == "short.png"


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "rates": (1.5, float("inf"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "rates": [1.5, None]}


def test_hash_of_a_file_is_that_of_its_bytes_and_of_their_pieces(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256(path) == sha256(b"abc") == sha256([b"a", b"", b"bc"]) == digest


def test_folders_are_complete_or_absent(tmp_path):
    folder = tmp_path / "result"
    with pytest.raises(RuntimeError), atomic_directory(folder) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for content in ("first", "second"):
        with atomic_directory(folder) as temporary:
            (temporary / "file").write_text(content)
    assert (folder / "file").read_text() == "second" and list(tmp_path.iterdir()) == [folder]


def test_leftovers_in_use_stay(tmp_path):
    with atomic_directory(tmp_path / "out") as first:
        (first / "first").touch()
        (first.with_suffix(".replaced")).mkdir()
        with atomic_directory(tmp_path / "out") as second:
            (second / "second").touch()
        assert (first / "first").exists() and first.with_suffix(".replaced").exists()
        (tmp_path / "out" / "second").unlink()
        (tmp_path / "out").rmdir()
        first.with_suffix(".replaced").rmdir()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["first"] and not list(tmp_path.glob(".*"))


def test_a_folder_is_replaced_without_a_moment_in_which_it_is_absent(tmp_path, monkeypatch):
    """On Linux and macOS, which exchange two folders in one operation."""
    folder, rename, renamed = tmp_path / "model", Path.rename, []
    with atomic_directory(folder) as unfinished:
        (unfinished / "weights").write_text("old")
    monkeypatch.setattr(Path, "rename", lambda self, target: (renamed.append(self), rename(self, target))[1])
    with atomic_directory(folder) as unfinished:
        (unfinished / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new" and renamed and folder not in renamed
    assert list(tmp_path.iterdir()) == [folder]


def test_where_folders_cannot_be_exchanged_both_are_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_directory(folder) as unfinished:
            (unfinished / "weights").write_text(content)
    assert (folder / "weights").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


def test_what_is_removed_is_whole_until_it_has_another_name(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "weights").touch()
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((folder.exists(), (path / "weights").exists())))
    remove(folder)
    assert seen == [(False, True)]


def test_credentials_stay_where_they_are():
    address = "https://user:pa%40ss@host.org:8080/data/train.parquet?signature=x&token=y#part"
    shown = "https://host.org:8080/data/train.parquet"
    assert hide_credentials(address) == f"{shown}#part"
    assert hide_credentials({"a": [f"read {address!r}."], "b": 3}) == {"a": [f"read '{shown}#part'."], "b": 3}
    for harmless in ("hf://datasets/a/b@main/x.tar", "s3://bucket/{000..099}.tar", "me@home", "a/b?c", "owner/name"):
        assert hide_credentials(harmless) == harmless


def test_files_that_are_for_reading_alone_and_links_go_with_their_folder(tmp_path, monkeypatch):
    """As copies of such files are; only a super-user could open them for writing."""
    opened, open_file = [], os.open

    def watched(path, flags, *arguments, **options):
        opened.append(flags)
        return open_file(path, flags, *arguments, **options)

    with atomic_directory(tmp_path / "model") as unfinished:
        (unfinished / "license").write_text("MIT")
        (unfinished / "license").chmod(0o444)
        (unfinished / "dangling").symlink_to("nowhere")
        monkeypatch.setattr("os.open", watched)
    assert (tmp_path / "model" / "license").read_text() == "MIT" and (tmp_path / "model" / "dangling").is_symlink()
    assert opened and not any(flags & (os.O_WRONLY | os.O_RDWR) for flags in opened)


def test_a_file_system_that_flushes_no_folders_is_written_to(tmp_path, monkeypatch):
    flush = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr("os.fsync", refuse_folders)
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    assert read_json(tmp_path / "new" / "a.json") == {"a": 1}


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise NotImplementedError("no locks")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    said = []
    with pytest.raises(KeyError) as caught, claim_folder(tmp_path / "out", said.append):
        raise KeyError("of the work")
    assert caught.value.__context__ is None and len(said) == 1 and "knows no locks" in said[0]
