"""A trained model as a Hub folder: weights, code, processor, licence and a card filled with what was measured."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from torch import nn
from transformers import BaseImageProcessor

import locatvit_hf
from locatvit_hf.conversion.card import FAMILIES, TASKS, describe_family
from locatvit_hf.conversion.export import licence_text
from training.arguments import RUNTIME_OPTIONS, RunArguments
from training.checkpointing import atomic_folder

# What is of no use to a reader who wants to repeat the run.
PRIVATE_OPTIONS = RUNTIME_OPTIONS | {"output_dir", "label_names"}

BODY = """
# {title}

{description}

{measured}

```python
from transformers import AutoImageProcessor, {auto_class}
from PIL import Image

processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(Image.open("image.jpg"), return_tensors="pt")
{usage}
```

`trust_remote_code=True` runs the Python files of this folder.

| | |
|---|---|
{facts}

## Training

Trained by locatvit-hf {version}{start}: {updates:,} updates of {batch_size:,} images, {processes}. The weights here are
those of update {step:,}. The recipe, as far as it differs from the defaults of `training/{program}.py`:

```yaml
{recipe}```

Method: {method}
"""


def save_pretrained(model: nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
    """Weights, configuration, code and processor, as transformers writes them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(
    folder: Path,
    model: nn.Module,
    processor: BaseImageProcessor,
    save: Callable[[nn.Module, BaseImageProcessor, Path], None] = save_pretrained,
) -> None:
    """Write a complete or no folder: what `save` writes, and the licence of the code.

    Raises OSError where it cannot be written, for example on a full disk; an earlier folder stays then.
    """
    try:
        with atomic_folder(folder) as temporary:
            save(model, processor, temporary)
            (temporary / "LICENSE").write_text(licence_text(), encoding="utf-8")
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise OSError(f"Cannot write the model {folder}: {error}") from None


def write_card(
    folder: Path, model: nn.Module, arguments: RunArguments, metrics: dict[str, Any], step: int, results: dict[str, Any]
) -> None:
    """Write README.md into the folder of an exported model of one of our families; leave other models alone.

    metrics, step: what the exported weights reached, and when. results: of the run, as in `all_results.json`.
    """
    config = getattr(model, "config", None)
    task = next((row for ending, row in TASKS.items() if type(model).__name__.endswith(ending)), None)
    if task is None or getattr(config, "model_type", None) not in FAMILIES:
        return
    pipeline_tag, auto_class, usage = task
    description, method, facts = describe_family(config)
    dataset = getattr(arguments, "dataset", None)
    # A path of this machine means nothing to a reader; its last part names the data.
    dataset = Path(dataset).name if dataset and Path(dataset).exists() else dataset
    scalars = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    name = arguments.push_to_hub or "PATH_OR_REPOSITORY"
    title = name.split("/")[-1] if arguments.push_to_hub else f"{config.model_type} on {dataset}"
    split = getattr(arguments, "validation_split", "validation")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[config.model_type, "vision"],
        datasets=[dataset] if dataset and not Path(arguments.dataset).exists() else None,
        metrics=list(scalars) or None,
        base_model=_hub_name(getattr(arguments, "pretrained", None)),
        model_name=title if scalars else None,
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=dataset or "unknown",
                dataset_name=dataset or "unknown",
                dataset_split=split,
                metric_type=metric,
                metric_value=round(value, 5),
            )
            for metric, value in scalars.items()
        ]
        or None,
    )
    defaults = {f.name: _default(f) for f in dataclasses.fields(arguments)}
    recipe = {
        option: value
        for option, value in dataclasses.asdict(arguments).items()
        if option not in PRIVATE_OPTIONS and value != defaults[option]
    }
    if "dataset" in recipe:
        recipe["dataset"] = dataset
    facts = {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Image size": config.image_size,
        "Patch size": getattr(config, "patch_size", "-"),
        "Classes": config.num_labels,
        **facts,
        "Normalisation": f"mean {list(config.image_mean)}, std {list(config.image_std)}",
    }
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in scalars.items())
    measured = f"Measured on the split `{split}` of `{dataset}`:\n\n| metric | value |\n|---|---|\n{rows}"
    processes = results["num_processes"]
    body = BODY.format(
        title=title,
        description=description,
        measured=measured if scalars else "Nothing was measured.",
        auto_class=auto_class,
        name=name,
        usage=usage,
        facts="\n".join(f"| {fact} | {value} |" for fact, value in facts.items()),
        version=locatvit_hf.__version__,
        start=f" from `{start}`" if (start := _hub_name(getattr(arguments, "pretrained", None))) else "",
        updates=results["updates"],
        batch_size=arguments.batch_size,
        processes="one process" if processes == 1 else f"{processes} processes",
        step=step,
        program=results["program"],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        method=method,
    )
    (folder / "README.md").write_text(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").content, encoding="utf-8")


def open_repository(repository: str) -> None:
    """Create the repository where it does not exist, before hours of training rather than after.

    Raises ValueError where it cannot be written.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(f"Cannot push to {repository}: {_first_line(error)}") from None


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder in one commit, replacing code that it no longer has; returns its address.

    Raises ValueError where it cannot be written.
    """
    try:
        return huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            delete_patterns=["*.py", "*.safetensors"],
            commit_message="Upload model, processor and card",
        ).commit_url
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(f"Cannot push {folder} to {repository}: {_first_line(error)}") from None


def _hub_name(name: str | None) -> str | None:
    return None if name is None or Path(name).exists() else name


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
