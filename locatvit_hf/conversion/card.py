"""The README.md of a converted checkpoint: what it is, where it came from, how to use it. No claim is unchecked."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .sources import Reference

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- {model_type}
- vision
---

# {title}

{description}

Converted by locatvit-hf {version} from `{source}`: {layout}; {where} of `{file}`, SHA-256 `{digest}`.

{tensors} The folder was reloaded and gave the same output.
No accuracy was measured here. The weights stay under the terms of their source; `LICENSE` is that of the code here.

```python
from transformers import AutoImageProcessor, {auto_class}
from PIL import Image

processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(Image.open("image.jpg"), return_tensors="pt")
{usage}
```

| | |
|---|---|
| Parameters | {parameters:,} |
| Image size | {image_size} |
| Patch size | {patch_size} |
| Classes | {classes} |
{facts}
| Normalisation | mean {mean}, std {std} |

Method: {method}
"""

LOCAT = """*Locality-Attending Vision Transformer*, Hajimiri, Beizaee, Shakeri, Desrosiers, Ben Ayed and Dolz,
ICLR 2026, [arXiv 2603.04892](https://arxiv.org/abs/2603.04892)."""
PACA = """*PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers*, Grainger, Paniagua, Song, Cuntoor, Lee
and Wu, CVPR 2023, [arXiv 2203.11987](https://arxiv.org/abs/2203.11987)."""

# Model type -> what it is, without LocAt; where that was published.
FAMILIES = {
    "locatvit": (
        "vision transformer",
        "*An Image is Worth 16x16 Words*, Dosovitskiy et al., ICLR 2021, [arXiv 2010.11929]"
        "(https://arxiv.org/abs/2010.11929).",
    ),
    "locatswin": (
        "Swin transformer",
        "*Swin Transformer: Hierarchical Vision Transformer using Shifted Windows*, Liu et al., ICCV 2021, "
        "[arXiv 2103.14030](https://arxiv.org/abs/2103.14030).",
    ),
    "locatjumbo": (
        "Jumbo vision transformer, whose class token is several tokens wide",
        "*Simpler Fast Vision Transformers with a Jumbo CLS Token*, Fuller et al., 2025, "
        "[arXiv 2502.15021](https://arxiv.org/abs/2502.15021).",
    ),
    "pacavit": ("PaCa-ViT, a vision transformer whose patches attend to learned clusters of patches", PACA),
}

# Ending of a model's class -> task of the pipeline, Auto class, what to do with the inputs.
TASKS = {
    "ForImageClassification": (
        "image-classification",
        "AutoModelForImageClassification",
        "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    ),
    "ForSemanticSegmentation": (
        "image-segmentation",
        "AutoModelForSemanticSegmentation",
        "print(processor.post_process_semantic_segmentation(model(**inputs))[0].shape)",
    ),
    "Model": (
        "image-feature-extraction",
        "AutoModel",
        "print(model(**inputs).last_hidden_state.shape)",
    ),
}


def write_card(
    folder: Path, reference: Reference, model: PreTrainedModel, where: str, tensors: str, digest: str, version: str
) -> None:
    """Writes README.md into `folder`.

    where: which part of the file was taken. tensors: what became of its tensors, a sentence.
    digest: SHA-256 of the source's weights. version: of this package.
    """
    name = type(model).__name__
    task, auto_class, usage = next(row for ending, row in TASKS.items() if name.endswith(ending))
    if name.startswith("UperNet"):
        # Auto classes know the backbone inside another model only where this package is imported.
        auto_class, usage = name, f"{usage}  # needs `import locatvit_hf`"
    config = getattr(model.config, "backbone_config", None) or model.config
    description, method, facts = describe_family(config)
    if name.startswith("UperNet"):
        description = f"{description} It is the backbone of a UPerNet for semantic segmentation."
    card = CARD.format(
        task=task,
        title=reference.architecture or config.model_type,
        description=description,
        source=Path(reference.source).name if Path(reference.source).exists() else reference.source,
        layout=reference.layout,
        where=where,
        file=reference.weights_file.name,
        digest=digest,
        version=version,
        auto_class=auto_class,
        name="PATH_OR_REPOSITORY",
        usage=usage,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=config.image_size,
        patch_size=getattr(config, "patch_size", "-"),
        classes=config.num_labels or "none",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        method=method,
        model_type=config.model_type,
        tensors=tensors,
        mean=list(config.image_mean),
        std=list(config.image_std),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def describe_family(config: PreTrainedConfig) -> tuple[str, str, dict[str, Any]]:
    """What a model of one of our families is: a sentence, where its method was published, and further facts."""
    kind, method = FAMILIES[config.model_type]
    if config.model_type == "pacavit":
        facts = {"Clustering": config.clustering_type, "Clusters of each stage": config.num_clusters}
        return f"A {kind}.", method, facts
    parts = {
        "Gaussian-augmented attention": config.use_gaussian,
        "patch representation refinement": config.use_refinement,
    }
    added = " and ".join(part for part, used in parts.items() if used)
    description = f"A {kind}, with {added} (LocAt)." if added else f"A plain {kind}: a baseline of LocAt."
    facts = {part[0].upper() + part[1:]: "yes" if used else "no" for part, used in parts.items()}
    return description, f"{LOCAT}\nIt builds on {method}" if added else method, facts


__all__ = ["FAMILIES", "TASKS", "describe_family", "write_card"]
