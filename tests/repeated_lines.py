"""Finds blocks of equal lines that stand twice in the package::

    python -m tests.repeated_lines

Lines are compared without indentation. Blank lines, comments, imports, exports, docstrings and the signatures of
functions are left out. A block that must stand twice, as where a file may not import another, says why: the line before
either of them is a comment with the word "twice".
"""

import ast
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("locatvit_hf", "training")
FEWEST = 6


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Numbers (from 1) and texts of the lines of a file that compute something."""
    text = path.read_text()
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if documentation or exports or isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in left_out)
    return [(number, line) for number, line in lines if line and line[0] != "#"]


def excused(path: Path, number: int) -> bool:
    """Whether the comment before a line says why it stands twice."""
    comment = []
    for line in reversed(path.read_text().splitlines()[: number - 1]):
        if line.strip()[:1] not in ("", "#"):
            break
        comment.append(line)
    return "twice" in " ".join(comment)


def repeated_blocks(paths: list[Path], root: Path = ROOT) -> list[tuple[str, str, int]]:
    """Places of the first and the second block, `file:line` each, and how many lines they share; longest blocks."""
    files = {path: code_lines(path) for path in paths}
    starts = defaultdict(list)
    for path, lines in files.items():
        for index in range(len(lines) - FEWEST + 1):
            starts[tuple(text for _, text in lines[index : index + FEWEST])].append((path, index))
    found, covered = [], set()
    for places in starts.values():
        for (first, i), (second, j) in pairwise(places):
            if (first, i, second, j) in covered:
                continue
            length = 0
            while (
                max(i + length - len(files[first]), j + length - len(files[second])) < 0
                and files[first][i + length][1] == files[second][j + length][1]
            ):
                covered.add((first, i + length, second, j + length))
                length += 1
            one, other = files[first][i][0], files[second][j][0]
            if not excused(first, one) and not excused(second, other):
                found.append((f"{first.relative_to(root)}:{one}", f"{second.relative_to(root)}:{other}", length))
    return found


def package_files() -> list[Path]:
    """The Python files in which nothing may stand twice."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


if __name__ == "__main__":
    for one, other, length in repeated_blocks(package_files()):
        print(f"{length} lines: {one} and {other}")
