"""Reading a page of `locatvit look` back."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np


class Reader(HTMLParser):
    """Balanced tags, every attribute that could load something, and the text of the scripts."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.scripts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("id")] = data


def read_report(html: str) -> dict:
    """The content of a page, of which it is checked that it is well-formed and loads nothing from elsewhere."""
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert all(value.startswith("data:") for value in reader.loaded)
    outside = html.replace("http://www.w3.org/2000/svg", "")  # the name of a language, which nothing loads
    assert not re.search(r"https?://|url\(|@import|fetch\(|import\(", outside)
    return json.loads(reader.scripts["content"])


def unpack(array: dict) -> np.ndarray:
    """An array of the content."""
    data = zlib.decompress(base64.b64decode(array["data"]))
    return np.frombuffer(data, np.dtype(array["type"]).newbyteorder("<")).reshape(array["shape"]).astype(np.float64)


def rows_of(layer: dict, name: str) -> np.ndarray:
    """Weights of a layer that are stored with the maximum of each row."""
    return unpack(layer[name]) * unpack(layer[f"{name}Largest"])[..., None] / 255
