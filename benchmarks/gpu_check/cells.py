"""What is checked and measured: one small record for each cell, and the phases that they make up."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DTYPES = ("bfloat16", "float16", "float32")
HEAD_SIZES = (64, 32, 80, 96, 128)
PREFIXES = (1, 0, 5, 20, 70)
GRIDS = ((14, 14), (32, 32), (7, 11), (37, 25), (1, 40), (40, 1), (16, 16), (9, 64), (5, 7), (13, 64))
CAPS = (169.0, 1.0, 9.0, 13100.0)
LAYOUTS = ("model", "packed", "channels", "contiguous")


@dataclass(frozen=True)
class Facts:
    """What the numbers depend on: the device, its versions, and two ceilings measured on it."""

    name: str = "facts"
    kind: str = "facts"


@dataclass(frozen=True)
class Case:
    """One correctness check: output and five gradients of an attention function against float64.

    attention: "fused" or "flex".
    grid: (height, width) in patches; prefix: tokens before the patches.
    cap: largest squared distance along an axis, in patches squared; block: side of the blocks of a coarse Gaussian.
    layout: how query, key and value lie in memory, see `work.laid_out`.
    logits, amplitude: factors on the query and on the amplitude of the bonus.
    gradient: "random", or "sum", whose gradient of the output is one number expanded: every stride is zero.
    compiled: through torch.compile, forward and backward in one graph.
    """

    name: str
    dtype: str
    grid: tuple[int, int]
    prefix: int = 1
    head_dim: int = 64
    batch: int = 2
    heads: int = 3
    cap: float = 169.0
    block: int = 1
    layout: str = "model"
    attention: str = "fused"
    logits: float = 1.0
    amplitude: float = 5.0
    gradient: str = "random"
    compiled: bool = False
    seed: int = 0
    kind: str = "case"


@dataclass(frozen=True)
class Speed:
    """One race: contenders run interleaved, with their times and memory.

    subject: "step" (a training step of a LocAtViT), "attention" (its attention alone, forward, and forward with
        backward), "windows" (the same of a LocAtSwin's windows with the mask of shifted ones), or "window step".
    contenders: "written" (the bias written out), "fused", "none" (plain attention without the Gaussian), "flex"
        (compiled flex attention) and "formula" (the bias of the formula, term by term), which is timed after the race.
    seconds: of the interleaved rounds.
    deciding: whether the default is decided by it.
    overrides: fields of the configuration that differ from the preset's.
    """

    name: str
    subject: str
    scale: str
    image_size: int
    batch: int
    contenders: tuple[str, ...]
    dtype: str = "bfloat16"
    seconds: float = 4.0
    deciding: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    kind: str = "speed"


@dataclass(frozen=True)
class Family:
    """A few training steps of one family with an optimizer, with every attention function from the same weights.

    overrides: fields of the configuration that differ from those of the preset "tiny".
    """

    name: str
    family: str
    dtype: str
    contenders: tuple[str, ...]
    image_size: int = 224
    batch: int = 16
    overrides: dict[str, Any] = field(default_factory=dict)
    kind: str = "family"


@dataclass(frozen=True)
class Profile:
    """Kernels of one step of `cell`: of the fused kernel's model and of its best rival's."""

    name: str
    cell: Speed
    contenders: tuple[str, ...]
    kind: str = "profile"


@dataclass(frozen=True)
class Drill:
    """What can go wrong, on purpose; only in a rehearsal.

    how: "succeeds", "raises", "dies", "hangs" or "poisons" (leaves the process without a usable device).
    limit: seconds that it may take; None for as long as any cell of the phase.
    """

    name: str
    how: str
    contenders: tuple[str, ...] = ()
    limit: float | None = None
    kind: str = "drill"


Cell = Facts | Case | Speed | Family | Profile | Drill


@dataclass
class Phase:
    """Cells in the order in which they are wanted.

    lanes: processes at a time; one where times are measured.
    reserve: seconds, of a run of 8 minutes, that earlier phases leave to this one.
    limit: seconds that one cell may take.
    """

    name: str
    title: str
    cells: list[Cell] = field(default_factory=list)
    lanes: int = 1
    reserve: float = 0.0
    limit: float = 60.0


class Race(NamedTuple):
    """A size of the races: images in a batch, so that every size has as many patches."""

    scale: str
    image_size: int
    batch: int


RACES = (
    *(Race("tiny", 1024, 16), Race("base", 1024, 4), Race("tiny", 512, 64), Race("base", 512, 16)),
    *(Race("tiny", 224, 334), Race("base", 224, 84)),
)
DECIDING_SIZES = (512, 1024)
# In the order in which they are prepared: where the time runs out, those that matter most are known.
CONTENDERS = ("written", "fused", "none", "flex", "formula")


def phases(seed: int, rehearsal: bool = False) -> list[Phase]:
    """All of them in order. The profile gets its cell when the times are known, from `profile_of`.

    seed: of the random shapes and of every input.
    """
    if rehearsal:
        return _rehearsal(seed)
    steps = [
        Speed(
            f"step {race.scale} {race.image_size}", "step", *race, CONTENDERS,
            seconds=5.0, deciding=race.image_size in DECIDING_SIZES,
        )
        for race in RACES
    ]  # fmt: skip
    alone = [Speed(f"attention {race.scale} {race.image_size}", "attention", *race, CONTENDERS) for race in RACES]
    windows = [
        Speed(f"{subject} tiny {size}", subject, "tiny", size, batch, ("written", "none", "flex"))
        for subject, size, batch in (("windows", 224, 64), ("windows", 512, 12), ("window step", 224, 64))
    ]
    # Steps, attention and the stages of a window step are compiled for every size anew: the last may find no time left.
    deciding = [cell for cell in steps if cell.deciding]
    rest = [cell for cell in steps if not cell.deciding]
    races = [*deciding, *alone[: len(deciding)], *windows[:2], *rest, *alone[len(deciding) :], windows[2]]
    families = []
    for dtype in ("bfloat16", "float16"):
        flex = ("flex_attention",) if dtype == "bfloat16" else ()
        for family in ("locatvit", "locatjumbo"):
            names = ("eager", "sdpa", "locat_fused", *flex)
            families.append(Family(f"{family} {dtype}", family, dtype, names))
        families.append(Family(f"locatswin {dtype}", "locatswin", dtype, ("eager", "sdpa", *flex)))
        families.append(Family(f"pacavit {dtype}", "pacavit", dtype, ("eager", "sdpa")))
    return [
        Phase("device", "Device", [Facts()], reserve=25.0, limit=120.0),
        Phase("correctness", "Correctness", correctness_cases(seed), lanes=8, reserve=100.0, limit=75.0),
        Phase("speed", "Speed and memory", races, reserve=220.0, limit=80.0),
        Phase("families", "Training steps of each family", families, lanes=4, reserve=60.0, limit=45.0),
        Phase("profile", "Profile of the slowest", reserve=30.0, limit=30.0),
    ]


def correctness_cases(seed: int) -> list[Case]:
    """Every type with every head size, all other properties taking turns; then the edges; then random shapes."""
    cases = []
    for turn, (again, head_dim) in enumerate(itertools.product(range(2), HEAD_SIZES)):
        for shift, dtype in enumerate(DTYPES):
            index = turn + shift
            cases.append(
                Case(
                    name=f"{dtype} {head_dim} #{again + 1}",
                    dtype=dtype,
                    head_dim=head_dim,
                    grid=GRIDS[(3 * turn + shift) % len(GRIDS)],
                    prefix=PREFIXES[(index + again) % len(PREFIXES)],
                    batch=1 + index % 3,
                    heads=3 - index % 2,
                    cap=CAPS[(index + again) % len(CAPS)],
                    block=1 + (turn + again) % 2,
                    layout=LAYOUTS[(index + 2 * again) % len(LAYOUTS)],
                    seed=seed + len(cases),
                )
            )
    for dtype in DTYPES:
        large = 20.0 if dtype == "float32" else 5.0
        cases += [
            Case(f"{dtype} 64x64 patches", dtype, (64, 64), batch=1, heads=2, seed=seed),
            Case(f"{dtype} gradient of a sum", dtype, (14, 14), gradient="sum", seed=seed),
            Case(f"{dtype} amplitude of zero", dtype, (9, 12), amplitude=0.0, seed=seed),
            # So large that exponentials overflow where the largest is not taken off; in half a type less so, where
            # nearly all weight on one key would leave no bits of a gradient, whatever computes it.
            Case(f"{dtype} large logits", dtype, (14, 14), logits=large, amplitude=5 * large, seed=seed),
        ]
    chosen = random.Random(seed)
    for number in range(12):
        cases.append(
            Case(
                name=f"random #{number + 1}",
                dtype=chosen.choice(DTYPES),
                grid=(chosen.randint(2, 40), chosen.randint(2, 40)),
                prefix=chosen.randint(0, 40),
                head_dim=chosen.choice((32, 48, 64, 80, 96, 112, 128)),
                batch=chosen.randint(1, 3),
                heads=chosen.randint(1, 4),
                cap=chosen.choice((*CAPS, float(chosen.randint(1, 900)))),
                block=chosen.choice((1, 2)),
                layout=chosen.choice(LAYOUTS),
                seed=chosen.randrange(2**31),
            )
        )
    cases.append(Case("bfloat16 one patch", "bfloat16", (1, 1), prefix=0, seed=seed))
    for attention in ("fused", "flex"):
        cases.append(
            Case(
                f"{attention} under torch.compile", "bfloat16", (14, 14), attention=attention, compiled=True, seed=seed
            )
        )
    cases.append(Case("flex bfloat16", "bfloat16", (37, 25), attention="flex", seed=seed))
    cases.append(Case("flex float32 coarse", "float32", (16, 16), prefix=5, block=2, attention="flex", seed=seed))
    return cases


def _rehearsal(seed: int) -> list[Phase]:
    """The same phases at sizes that an interpreter on a processor gets through, and one where everything goes wrong."""
    drills = [Drill("hangs", "hangs", limit=0.5)]
    drills += [Drill(how, how) for how in ("raises", "dies", "poisons", "succeeds")]
    drills += [Drill(f"{how} in a race", how, ("first", "second", "third")) for how in ("dies", "poisons")]
    small = {"batch": 1, "heads": 1, "head_dim": 32, "seed": seed}
    cases = [
        Case("float32", "float32", (3, 4), cap=4.0, layout="packed", **small),
        Case("bfloat16", "bfloat16", (5, 7), prefix=5, block=2, layout="channels", **small),
        Case("float16 gradient of a sum", "float16", (4, 6), prefix=0, gradient="sum", **small),
    ]
    one_head = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1}
    pyramid = {"depths": [1, 1, 1, 1]}
    swin = {**pyramid, "embed_dim": 16, "num_heads": [1, 1, 1, 1]}
    pacavit = {**pyramid, "hidden_sizes": [16, 16, 16, 16], "num_attention_heads": [1, 1, 1, 1]}
    tiny = {"seconds": 0.01, "overrides": one_head}
    speed = [
        Speed("step tiny 32", "step", "tiny", 32, 1, CONTENDERS, deciding=True, **tiny),
        Speed("attention tiny 32", "attention", "tiny", 32, 1, CONTENDERS, **tiny),
        Speed("windows tiny 56", "windows", "tiny", 56, 1, ("written", "none", "flex"), seconds=0.01),
        Speed("window step tiny 32", "window step", "tiny", 32, 1, ("written", "flex"), seconds=0.01, overrides=swin),
    ]
    sizes = {"batch": 1, "image_size": 32}
    families = [
        Family("locatvit bfloat16", "locatvit", "bfloat16", ("eager", "locat_fused"), overrides=one_head, **sizes),
        Family("locatvit float16", "locatvit", "float16", ("eager", "sdpa"), overrides=one_head, **sizes),
        Family("locatjumbo bfloat16", "locatjumbo", "bfloat16", ("eager", "sdpa"), overrides=one_head, **sizes),
        Family("locatswin bfloat16", "locatswin", "bfloat16", ("eager", "sdpa"), overrides=swin, **sizes),
        Family("pacavit float16", "pacavit", "float16", ("sdpa",), overrides=pacavit, **sizes),
    ]
    return [
        Phase("device", "Device", [Facts()], reserve=60.0),
        Phase("drill", "Drill", drills, reserve=10.0, lanes=2),
        Phase("correctness", "Correctness", cases, lanes=2, reserve=60.0),
        Phase("speed", "Speed and memory", speed, reserve=60.0),
        Phase("families", "Training steps of each family", families, lanes=2, reserve=60.0),
        Phase("profile", "Profile of the slowest", reserve=30.0),
    ]


def profile_of(cell: Speed, rival: str) -> Profile:
    """The profile of the fused kernel and of `rival` in the race `cell`."""
    return Profile(f"{cell.name}, fused and {rival}", cell, ("fused", rival))
