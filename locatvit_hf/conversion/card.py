"""The README.md of a converted checkpoint: what it is, where it came from, how to use it. No claim is unchecked."""

from pathlib import Path

from transformers import PreTrainedModel

from .sources import Reference

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- locatvit
- vision
---

# {title}

{description}

Converted by locatvit-hf {version} from `{source}`: {layout}; {where} of `{file}`, SHA-256 `{digest}`.

Every tensor was accounted for, and the folder was reloaded and compared with its source. No accuracy was measured here,
and the weights stay under the terms of their source; `LICENSE` is that of the code in this folder.

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
    folder: Path, reference: Reference, model: PreTrainedModel, where: str, digest: str, version: str
) -> None:
    """Writes README.md into `folder`.

    where: which part of the file was taken. digest: SHA-256 of the source's weights. version: of this package.
    """
    name = type(model).__name__
    task, auto_class, usage = next(row for ending, row in TASKS.items() if name.endswith(ending))
    if name.startswith("UperNet"):
        # Auto classes know the backbone inside another model only where this package is imported.
        auto_class, usage = name, f"{usage}  # needs `import locatvit_hf`"
    config = getattr(model.config, "backbone_config", None) or model.config
    gaussian, refinement = (getattr(config, name, False) for name in ("use_gaussian", "use_refinement"))
    if gaussian or refinement:
        parts = ["Gaussian-augmented attention"] * gaussian + ["patch representation refinement"] * refinement
        description = f"A vision transformer with {' and '.join(parts)} (LocAt)."
    elif config.model_type == "pacavit":
        description = "A PaCa-ViT: a vision transformer whose patches attend to learned clusters of patches."
    else:
        description = "A plain vision transformer, the baseline that LocAt models are compared with."
    facts = {"Gaussian-augmented attention": gaussian, "Patch representation refinement": refinement}
    facts = {name: "yes" if used else "no" for name, used in facts.items()}
    if config.model_type == "pacavit":
        facts = {"Clustering": config.clustering_type, "Clusters of each stage": config.num_clusters}
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
        method=PACA if config.model_type == "pacavit" else LOCAT,
        mean=list(config.image_mean),
        std=list(config.image_std),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


__all__ = ["write_card"]
