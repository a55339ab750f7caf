"""What the results say: a decision by a written rule, and tables for people."""

import statistics
from collections.abc import Iterator
from typing import Any

from .cells import Phase, Profile, Speed, profile_of

Results = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]


# ------------------------------------------------------------------------------------------------------------ decision
def decide(results: Results) -> dict[str, Any]:
    """Which attention function `sdpa` should use on CUDA: "fused", "flex" or "written".

    The rule. The fused kernel becomes the default if
    1. every correctness case of it was run and passed,
    2. no training step of a family with it failed, and
    3. in each training step at 512 and 1024 pixels, tiny and base, it is faster than the written bias and than compiled
       flex attention: the upper quartile of the ratios of its time to theirs, round by round, is below 1. A rival that
       failed by itself, out of memory say, is beaten there; one that there was no time for is not.
    Otherwise compiled flex attention does, if its own cases passed and it is faster than the written bias in the same
    sense. Otherwise the bias stays written out.

    Args:
        results: as stored. Only what is in there counts: what was not measured speaks for nobody.

    Returns:
        `default`, and `reasons`: sentences, the first that of the verdict.
    """
    reasons = []
    for candidate, rivals in (("fused", ("written", "flex")), ("flex", ("written",))):
        against = [*wrong(results, candidate), *not_faster(results, candidate, rivals)]
        if not against:
            return {
                "default": candidate,
                "reasons": [
                    f"{candidate} is right, and faster than {' and '.join(rivals)} in every deciding step.",
                    *reasons,
                ],
            }
        reasons += [f"Not {candidate}: {sentence}" for sentence in against]
    return {"default": "written", "reasons": ["The bias stays written out.", *reasons]}


def wrong(results: Results, candidate: str) -> list[str]:
    """What speaks against the correctness of "fused" or "flex"."""
    of_candidate = {
        name: cell for name, cell in cells_of(results, "correctness").items() if cell["cell"]["attention"] == candidate
    }
    against = [f"{word} {names}." for word, names in sorted_out(of_candidate)]
    if not of_candidate:
        against.append("no correctness case.")
    function = {"fused": "locat_fused", "flex": "flex_attention"}[candidate]
    for name, cell in cells_of(results, "families").items():
        record = cell.get("contenders", {}).get(function, {})
        if "missing" in record or record.get("finite") is False:
            against.append(f"training {name} {record.get('missing', 'is not finite')}.")
        elif record and cell["state"] == "failed":
            against.append(f"training {name} does not agree with the others.")
    return against


def sorted_out(cells: Results) -> Iterator[tuple[str, str]]:
    """("failed" or "not measured", names) of the cells that are not as they should be."""
    for state in ("failed", "not measured"):
        if names := [name for name, cell in cells.items() if cell["state"] == state]:
            yield state, ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def not_faster(results: Results, candidate: str, rivals: tuple[str, ...]) -> list[str]:
    """In which deciding steps the candidate is not shown to be faster than a rival."""
    deciding = {name: cell for name, cell in cells_of(results, "speed").items() if cell["cell"]["deciding"]}
    against = [] if deciding else ["no training step was measured."]
    for name, cell in deciding.items():
        mine = cell.get("contenders", {}).get(candidate, {})
        for rival in rivals:
            ratios = ratios_of(cell, candidate, rival)
            beaten = "missing" in cell.get("contenders", {}).get(rival, {}) and times_of(mine) is not None
            if ratios is None and not beaten:
                against.append(f"{name}: not measured against {rival}.")
            elif ratios is not None and not quartiles(ratios)[2] < 1.0:
                against.append(f"{name}: {spread(ratios)} of the time of {rival}.")
    return against


def slowest(results: Results) -> Profile | None:
    """The training step in which the fused kernel does worst beside its best rival; None where none was measured."""
    worst = None
    for cell in cells_of(results, "speed").values():
        for rival in ("written", "flex") if cell["cell"]["subject"] == "step" else ():
            if ratios := ratios_of(cell, "fused", rival):
                worst = max(worst or (0.0,), (statistics.median(ratios), cell["cell"], rival), key=lambda one: one[0])
    if worst is None:
        return None
    cell = {**worst[1], "contenders": tuple(worst[1]["contenders"])}
    return profile_of(Speed(**cell), worst[2])


# ------------------------------------------------------------------------------------------------------------- reading
def cells_of(results: Results, phase: str) -> Results:
    return results["phases"].get(phase, {}).get("cells", {})


def times_of(record: dict, part: str = "step") -> list[float] | None:
    """Seconds of a contender in every round; None where it was not measured."""
    return record.get("parts", {}).get(part, {}).get("seconds")


def ratios_of(cell: dict, name: str, rival: str, part: str = "step") -> list[float] | None:
    """Time over the rival's, round by round; None where one of them was not measured."""
    ours, theirs = (times_of(cell.get("contenders", {}).get(each, {}), part) for each in (name, rival))
    return [one / other for one, other in zip(ours, theirs, strict=False)] if ours and theirs else None


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def spread(values: list[float] | None, digits: int = 2) -> str:
    if not values:
        return ""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


# -------------------------------------------------------------------------------------------------------------- tables
def summary(results: Results, phases: list[Phase]) -> Table:
    """What was printed last: every phase, the deciding steps, and the decision."""
    rows = []
    for phase in phases:
        cells = cells_of(results, phase.name)
        count = {state: sum(cell["state"] == state for cell in cells.values()) for state in STATES}
        took = results["phases"][phase.name].get("seconds")
        rows.append([phase.title, ", ".join(f"{number} {state}" for state, number in count.items() if number) or "none",
                     f"{took:.0f} s" if took is not None else ""])  # fmt: skip
    for name, cell in cells_of(results, "speed").items():
        if cell["cell"]["subject"] == "step":
            text = ", ".join(
                f"{rival} {spread(ratios)}"
                for rival in ("written", "flex", "none")
                if (ratios := ratios_of(cell, "fused", rival))
            )
            rows.append([f"{name}: time of fused over", text or "not measured", ""])
    rows.append(["default of sdpa on CUDA", results["decision"]["default"], ""])
    return "Verdict", ["", "", ""], rows


STATES = ("measured", "failed", "not measured")


def tables(results: Results, phases: list[Phase]) -> Iterator[Table]:
    """All of them, the verdict first."""
    yield summary(results, phases)
    yield "Device", ["", ""], [[name, str(value)] for name, value in results["device"].items()]
    yield (
        "Correctness: relative errors against float64",
        CASE_HEADER,
        [case_row(name, cell) for name, cell in cells_of(results, "correctness").items()],
    )
    for name, cell in cells_of(results, "speed").items():
        yield f"{name}, batch {cell['cell']['batch']}, {cell['cell']['dtype']}", RACE_HEADER, list(race_rows(cell))
    rows = [row for name, cell in cells_of(results, "families").items() for row in family_rows(name, cell)]
    yield "Training steps of each family", ["", "attention", "first loss", "last loss", "skipped", "finite"], rows
    for name, cell in cells_of(results, "profile").items():
        for contender, record in cell.get("contenders", {}).items():
            rows = [[row["name"], f"{row['ms']:.2f}", f"{row['calls']:.0f}"] for row in record.get("kernels", [])]
            title = f"Kernels: {name}: {contender}"
            yield title, ["", "ms", "calls"], rows or [[record.get("missing", "not measured"), "", ""]]
    rows = [
        [f"{results['phases'][phase.name]['title']}: {name}", cell["state"], cell.get("why", "")]
        for phase in phases
        for name, cell in cells_of(results, phase.name).items()
        if cell["state"] != "measured"
    ]
    yield "Failed, or not measured", ["", "", "why"], rows


CASE_HEADER = ["", "shape", "passed", "worst", "error", "limit", "of the written bias", "same bits"]


def case_row(name: str, record: dict) -> list[str]:
    cell = record["cell"]
    height, width = cell["grid"]
    shape = (
        f"{cell['batch']}x{cell['heads']} heads of {cell['head_dim']}, {cell['prefix']} + {height}x{width}, "
        f"cap {cell['cap']:g}, block {cell['block']}, {cell['layout']}"
    )
    if "errors" not in record:
        return [name, shape, record["state"], *[""] * 5]

    def over_the_limit(item: tuple[str, dict]) -> float:
        ours = item[1]["ours"]
        return ours / item[1]["limit"] if isinstance(ours, float) and isinstance(item[1]["limit"], float) else 1e9

    worst, error = max(record["errors"].items(), key=over_the_limit)
    numbers = [
        f"{value:.1e}" if isinstance(value, float) else str(value)
        for value in (error["ours"], error["limit"], error["written"])
    ]
    bits = {True: "yes", False: "no", None: ""}[record["same_bits"]]
    return [name, shape, "yes" if record["passed"] else "no", worst, *numbers, bits]


RACE_HEADER = ["", "part", "ms", "over written", "peak MB", "first call, s", ""]


def race_rows(cell: dict) -> Iterator[list[str]]:
    contenders = cell.get("contenders", {})
    for name in cell["cell"]["contenders"]:
        record = contenders.get(name, {})
        if "parts" not in record:
            yield [name, "", "not measured", "", "", "", record.get("missing", cell.get("why", ""))]
            continue
        for part, known in record["parts"].items():
            seconds, size = known.get("seconds"), known.get("bytes")
            yield [
                name,
                part,
                spread([1e3 * second for second in seconds], 3) if seconds else "not measured",
                spread(ratios_of(cell, name, "written", part)) if name != "formula" else "",
                f"{size / 1e6:.0f}" if size is not None else "not measured",
                f"{known['first_seconds']:.1f}",
                ("one graph" if known["captured"] else "") + ("" if known["finite"] else " not finite"),
            ]


def family_rows(name: str, cell: dict) -> Iterator[list[str]]:
    for attention in cell["cell"]["contenders"]:
        record = cell.get("contenders", {}).get(attention, {})
        if "losses" not in record:
            yield [name, attention, "not measured", record.get("missing", cell.get("why", "")), "", ""]
            continue
        first, last = (str(record["losses"][index])[:7] for index in (0, -1))
        yield [name, attention, first, last, str(record["skipped"]), "yes" if record["finite"] else "no"]


def markdown(results: Results, phases: list[Phase]) -> str:
    """Everything, for people."""
    parts = [
        f"# Check of the fused kernel\n\n`{results['command']}`, commit {results['commit']}, seed {results['seed']}, "
        f"{results['started']}, {results['seconds']:.0f} s"
    ]
    if results["rehearsal"]:
        parts.append("A rehearsal on the processor: it says nothing about a GPU, and decides nothing.")
    parts.append(
        "\n".join(results["decision"]["reasons"][:1] + [f"- {text}" for text in results["decision"]["reasons"][1:]])
    )
    parts.append(LEGEND)
    for title, header, rows in tables(results, phases):
        lines = [header, ["---"] * len(header), *rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        parts.append(f"## {title}\n\n{body if rows else 'None.'}")
    return "\n\n".join(parts) + "\n"


LEGEND = """Times are medians over the rounds, with quartiles; in a round every contender runs once, in an order drawn
anew, and ratios are taken within a round. `written`: PyTorch's attention with the bias written out; `none`: without
the Gaussian; `flex`: compiled flex attention; `formula`: the bias term by term, timed by itself. A step is forward,
loss and backward. Peak MB lie above the idle model. An error is ||x - float64|| / ||float64||; its limit follows from
the type, the number of tokens and the largest logit, and above half of that also from the error of the written bias."""


def text(table: Table) -> str:
    """A table for the terminal, columns aligned."""
    title, _, rows = table
    widths = [max((len(row[index]) for row in rows), default=0) for index in range(len(rows[0]) if rows else 0)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])
