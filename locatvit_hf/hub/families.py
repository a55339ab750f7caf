"""What a card says of each family: what it is, where that was published, and what its data teach it."""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig


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
        first = self.authors.split(" and ")[0].split(",")[0]
        return (
            f"*{self.title}*, {first} et al., {self.venue} {self.year}, "
            f"[arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})"
        )

    @property
    def bibtex(self) -> str:
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

# Model type -> what it is, without LocAt; where that was published.
FAMILIES = {
    "locatvit": ("vision transformer", VIT),
    "locatswin": ("Swin transformer", SWIN),
    "locatjumbo": ("Jumbo vision transformer, whose class token is several tokens wide", JUMBO),
    "pacavit": ("PaCa-ViT, a vision transformer whose patches attend to learned clusters of patches", PACA),
}

# Words in the name of the training data -> what to know about a model that learned from it.
DATA = {
    ("imagenet",): (
        "ImageNet shows what its classes were chosen to show: more than a hundred breeds of dogs, few people, one "
        "object, mostly in the middle of the picture. Its photographs come from the web, [most of them from North "
        "America and Europe](https://arxiv.org/abs/1711.08536), and models are right less often about [the household "
        "objects of poorer places](https://arxiv.org/abs/1906.02659). They lean on "
        "[texture](https://arxiv.org/abs/1811.12231) and background. Its [labels are partly "
        "wrong](https://arxiv.org/abs/2006.07159), and the [people in its pictures were not "
        "asked](https://arxiv.org/abs/2006.16923)."
    ),
    ("ade20k", "adechallenge", "scene_parse_150"): (
        "ADE20K shows indoor and street scenes, and its 150 classes cover nothing else; rare classes are much worse "
        "than the mean tells."
    ),
    ("coco",): (
        "COCO shows everyday scenes in photographs from Flickr; small and crowded objects are found much less often "
        "than the mean tells."
    ),
}


def describe_family(config: PreTrainedConfig) -> tuple[str, list[Paper], dict[str, Any]]:
    """What a model of one of our families is: a sentence, its papers with the most important first, further facts."""
    kind, paper = FAMILIES[config.model_type]
    if config.model_type == "pacavit":
        facts = {"Clustering": config.clustering_type, "Clusters of each stage": config.num_clusters}
        return f"A {kind}.", [paper], facts
    papers, features = [paper], []
    if registers := getattr(config, "num_register_tokens", 0):
        papers.append(REGISTERS)
        features.append(f"{registers} register tokens")
    if getattr(config, "position_embedding_type", None) == "rope_mixed":
        papers.append(ROPE)
        features.append("learned rotary position embeddings")
    parts = {
        "Gaussian-augmented attention": config.use_gaussian,
        "patch representation refinement": config.use_refinement,
    }
    facts = {part[0].upper() + part[1:]: "yes" if used else "no" for part, used in parts.items()}
    added = [part for part, used in parts.items() if used]
    if not added:
        extras = f" with {' and '.join(features)}" if features else ""
        return f"A plain {kind}{extras}: a baseline of LocAt.", papers, facts
    described = ", ".join([*features, " and ".join(added)])
    return f"A {kind}, with {described} (LocAt).", [LOCAT, *papers], facts


def limits_of_data(names: list[str]) -> list[str]:
    """What to know of a model that learned from these data sets, a paragraph each; nothing for those not known here."""
    names = [name.lower().replace("-", "") for name in names]
    return [text for words, text in DATA.items() if any(word in name for word in words for name in names)]


__all__ = ["DINO", "FAMILIES", "LOCAT", "PACA", "Paper", "describe_family", "limits_of_data"]
