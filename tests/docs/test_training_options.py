"""The page of training options says what the settings of the programs declare."""

from training.engine.options_page import PAGE, page


def test_the_page_is_what_the_programs_declare() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "Write it anew with python -m training.engine.options_page."


def test_every_option_has_a_default_a_type_and_a_meaning() -> None:
    text = page()
    assert "| `batch_size` | `1024` | integer, at least 1 | Images" in text
    assert "| `label_smoothing` | `0.1` | number, 0 to 1 |" in text
    assert "| `crop_scale` | `[0.08, 1.0]` | list of numbers, at least 0, two of them |" in text
    assert "| `schedule` | `linear` | `linear` or `cosine` or `constant` or `step` |" in text
    assert "## training.finetune" in text and "| `schedule` | `cosine` |" in text
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "| `" in line]
    assert cells and all(len(row) == 4 and all(row) for row in cells)
