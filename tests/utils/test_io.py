"""Text files as people's systems write them; files and folders whole or as before; errors on a line."""

import json

import pytest

from locatvit_hf.utils.io import (
    atomic_directory,
    atomic_write,
    fitting_name,
    one_line,
    read_json,
    read_text,
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
