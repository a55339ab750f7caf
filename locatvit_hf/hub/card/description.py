"""What a card says of each family and of what its data teach it."""

from typing import Any

from transformers import PreTrainedConfig

from ...utils.papers import LOCAT, REGISTERS, ROPE, Paper
from ...utils.registry import FAMILIES

# Words in the name of the training data -> what to know about a model that learned from it.
DATA = {
    ("imagenet",): (
        "ImageNet shows what its classes were chosen to show: more than a hundred breeds of dogs, few people, one "
        "object, mostly in the middle of the image. Its photographs come from the web, [most of them from North "
        "America and Europe](https://arxiv.org/abs/1711.08536), and models are right less often about [the household "
        "objects of poorer places](https://arxiv.org/abs/1906.02659). They lean on "
        "[texture](https://arxiv.org/abs/1811.12231) and background. Its [labels are partly "
        "wrong](https://arxiv.org/abs/2006.07159), and the [people in its images were not "
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
    family = FAMILIES[config.model_type]
    kind, facts = family.description, dict[str, Any]()
    if hasattr(config, "num_clusters"):
        facts |= {"Clustering": config.clustering_type, "Clusters of each stage": config.num_clusters}
    papers, features = [family.paper], []
    if registers := getattr(config, "num_register_tokens", 0):
        papers.append(REGISTERS)
        features.append(f"{registers} register tokens")
    if getattr(config, "position_embedding_type", None) == "rope_mixed":
        papers.append(ROPE)
        features.append("learned rotary position embeddings")
    parts = {
        part: getattr(config, field)
        for part, field in (
            ("Gaussian-augmented attention", "use_gaussian"),
            ("patch representation refinement", "use_refinement"),
        )
        if hasattr(config, field)
    }
    facts |= {part[0].upper() + part[1:]: "yes" if used else "no" for part, used in parts.items()}
    added = [part for part, used in parts.items() if used]
    if not added:
        extras = f" with {' and '.join(features)}" if features else ""
        return (f"A plain {kind}{extras}: a baseline of LocAt." if parts else f"A {kind}{extras}."), papers, facts
    described = ", ".join([*features, " and ".join(added)])
    return f"A {kind}, with {described} (LocAt).", [LOCAT, *papers], facts


def limits_of_data(names: list[str]) -> list[str]:
    """What to know of a model that learned from these datasets, a paragraph each; nothing for those not known here."""
    names = [name.lower().replace("-", "") for name in names]
    return [text for words, text in DATA.items() if any(word in name for word in words for name in names)]


__all__ = ["describe_family", "limits_of_data"]
