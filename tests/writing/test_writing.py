"""Files are whole or as before; errors fit on a line."""

import pytest

from locatvit_hf.writing import fitting_name, one_line, write_complete


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "card.md"
    write_complete(path, lambda temporary: temporary.write_text("whole"))

    def fail(temporary):
        assert temporary.suffix == ".md" and path.read_text() == "whole"
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_complete(path, fail)
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
        write_complete(tmp_path / name, lambda temporary: temporary.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == names and len(names) == 3
    assert fitting_name("short", ".png") == "short.png"
