"""The publications that cards cite."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A publication. authors: as BibTeX writes them."""

    key: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str

    @property
    def sentence(self) -> str:
        """Title, first author, venue and link, in Markdown."""
        first = self.authors.split(" and ")[0].split(",")[0]
        return (
            f"*{self.title}*, {first} et al., {self.venue} {self.year}, "
            f"[arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})"
        )

    @property
    def bibtex(self) -> str:
        """Its entry in BibTeX."""
        kind, where = ("article", "journal") if self.venue == "arXiv" else ("inproceedings", "booktitle")
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            where: self.venue,
            "year": self.year,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@{kind}{{{self.key},\n{lines}\n}}"


LOCAT = Paper(
    "hajimiri2026locat",
    "Locality-Attending Vision Transformer",
    "Hajimiri, S. and Beizaee, F. and Shakeri, F. and Desrosiers, C. and Ben Ayed, I. and Dolz, J.",
    "ICLR",
    2026,
    "2603.04892",
)
PACA = Paper(
    "grainger2023paca",
    "PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers",
    "Grainger, Ryan and Paniagua, Thomas and Song, Xi and Cuntoor, Naresh and Lee, Mun Wai and Wu, Tianfu",
    "CVPR",
    2023,
    "2203.11987",
)
VIT = Paper(
    "dosovitskiy2021vit",
    "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    "Dosovitskiy, Alexey and others",
    "ICLR",
    2021,
    "2010.11929",
)
REGISTERS = Paper(
    "darcet2024registers",
    "Vision Transformers Need Registers",
    "Darcet, Timothée and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr",
    "ICLR",
    2024,
    "2309.16588",
)
ROPE = Paper(
    "heo2024rope",
    "Rotary Position Embedding for Vision Transformer",
    "Heo, Byeongho and Park, Song and Han, Dongyoon and Yun, Sangdoo",
    "ECCV",
    2024,
    "2403.13298",
)
SWIN = Paper(
    "liu2021swin",
    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    "Liu, Ze and others",
    "ICCV",
    2021,
    "2103.14030",
)
JUMBO = Paper(
    "fuller2025jumbo",
    "Simpler Fast Vision Transformers with a Jumbo CLS Token",
    "Fuller, Anthony and others",
    "arXiv",
    2025,
    "2502.15021",
)
DINO = Paper(
    "caron2021dino",
    "Emerging Properties in Self-Supervised Vision Transformers",
    "Caron, Mathilde and others",
    "ICCV",
    2021,
    "2104.14294",
)

__all__ = ["DINO", "JUMBO", "LOCAT", "PACA", "REGISTERS", "ROPE", "SWIN", "VIT", "Paper"]
