"""Text files as people's systems write them."""

import pytest

from locatvit_hf.utils.io import read_json, read_text


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
    ],
)
def test_other_encodings_are_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
