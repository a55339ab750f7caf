"""Which classes the label maps of a split hold: a class without a pixel is neither learned nor measured."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from training.data.label_maps import IGNORE_INDEX, LabelArguments

MOST_NAMES = 5


def count_pixels(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Pixels of each class, and last of those without one, (num_labels + 1,) int64, of class ids of any shape."""
    counts = torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)
    return torch.cat([counts[:num_labels], counts[num_labels:].sum()[None]])


class LabelCounts:
    """Pixels of each class in the label maps of a split, as they are met.

    Args:
        split: what messages call it, "training" or "validation".
        names: of the classes.
        arguments: how label maps are read.
    """

    def __init__(self, split: str, names: list[str], arguments: LabelArguments):
        self.split, self.names, self.arguments = split, names, arguments
        self.pixels, self.num_maps = torch.zeros(len(names) + 1, dtype=torch.int64), 0

    def add(self, counts: torch.Tensor) -> None:
        """Add what `count_pixels` found: (num_labels + 1,) of one map, or (maps, num_labels + 1)."""
        counts = counts.reshape(-1, len(self.names) + 1)
        self.pixels = self.pixels.to(counts.device) + counts.sum(dim=0)
        self.num_maps += len(counts)

    def check(self, accelerator: Accelerator, report: Callable[[str], None], least: int) -> None:
        """Report which classes no label map of any process holds. To be called in all processes.

        Args:
            accelerator: of the processes.
            report: called in each of them with one sentence, where there is something to say.
            least: classes without which the split is of no use.

        Raises:
            ValueError: fewer classes than `least` occur.
        """
        mine = torch.cat([self.pixels.cpu(), torch.tensor([self.num_maps])]).to(accelerator.device)
        *pixels, num_maps = accelerator.reduce(mine, reduction="sum").tolist()
        absent = [name for name, count in zip(self.names, pixels, strict=False) if not count]
        if not absent or not num_maps:
            return
        sentence = self._describe(absent, unlabeled=pixels[-1], total=sum(pixels), num_maps=num_maps)
        if len(self.names) - len(absent) < least:
            raise ValueError(sentence)
        report(sentence)

    def _describe(self, absent: list[str], unlabeled: int, total: int, num_maps: int) -> str:
        names = [repr(name) for name in absent[:MOST_NAMES]]
        if len(absent) > MOST_NAMES:
            names.append(f"one of {len(absent) - MOST_NAMES} other classes")
        listed = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        what = listed if unlabeled < total else "of a class"
        count = f"all {total:,}" if unlabeled == total else f"{unlabeled:,} of {total:,}"
        sentence = f"No pixel of the {num_maps:,} {self.split} label maps is {what}"
        if not unlabeled:
            return f"{sentence}; see --label_names and --label_mapping."
        if self.arguments.label_mapping:
            return (
                f"{sentence}: {count} are of values that --label_mapping leaves out or maps to no class; it has to "
                "name the ids or colors that the masks hold, and JPEG files change these."
            )
        if self.arguments.reduce_labels:
            return f"{sentence}: {count} are 0 or 255, which with --reduce_labels means no class."
        remedy = "for masks of 0 and 255 give --label_mapping '{0: 0, 255: 1}'"
        if len(self.names) != 2:
            remedy = "where that is a class, name the class of each id with --label_mapping"
        return f"{sentence}, but {count} are 255, which means no class; {remedy}."
