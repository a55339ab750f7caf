"""Fine-tuning of any of our checkpoints, or of any plain ViT, on the classes of another dataset.

accelerate launch -m training.finetune --pretrained FOLDER --dataset FOLDER --output_dir runs/finetuned

Options of the Trainer and of its examples are understood too, as far as they have a counterpart: --model_name_or_path,
--num_train_epochs, --per_device_train_batch_size, --warmup_ratio, --lr_scheduler_type, --bf16, --report_to and so on.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from training.data import load_splits
from training.engine.arguments import option, run_program
from training.engine.distributed import create_accelerator
from training.engine.export import save_pretrained
from training.engine.schedule import Schedule
from training.engine.trainer_names import AS_TYPED, OPTIONS, translate
from training.tasks.checkpoint_loading import label_fields, load_pretrained, rebuild, without_num_labels
from training.tasks.classification import ClassifierArguments, train_classifier


@strict
@dataclass(kw_only=True)
class FinetuneArguments(ClassifierArguments):
    """Settings of `finetune`; the defaults are our choice for a few thousand images or more."""

    other_names: ClassVar[dict[str, str]] = OPTIONS
    other_names_as_typed: ClassVar[tuple[str, ...]] = AS_TYPED
    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(translate)

    pretrained: str | None = option(None, "Folder or Hub name of one of our models, or of a ViT of another library.")
    model: dict[str, Any] = option({}, "Fields of the configuration to change: --model.drop_path_rate 0.1.")
    freeze: bool = option(False, "Train the classifier only, and what `unfreeze` names.")
    unfreeze: list[str] = option([], "With freeze, parts of names of parameters to train too: [gaussian].")
    lora: dict[str, Any] = option({}, "Train low-rank adapters: fields of PEFT's LoraConfig, such as --lora.r 8.")
    new_gaussian_factor: float | int = option(
        10.0, "Learning rate of Gaussians that the checkpoint does not have, relative to the others."
    )
    length: str = "20 epochs"
    warmup: str = "10 %"
    schedule: Literal["linear", "cosine", "constant", "step"] = "cosine"
    learning_rate: float | int = option(5e-4, "Peak learning rate.")
    layer_decay: float | int | None = option(0.75, "Learning rate of a layer relative to the next one.")
    max_gradient_norm: float | int | None = 1.0
    batch_size: int = 128
    mixup: float | int = 0.0
    cutmix: float | int = 0.0


def main(arguments: FinetuneArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_splits(arguments)
    schedule = Schedule.resolve(arguments, len(splits.train), accelerator.num_processes)
    torch.manual_seed(arguments.seed)
    model, new_gaussians = build_model(arguments, splits.label_names or [])
    if new_gaussians:
        factors = {"gaussian": arguments.new_gaussian_factor, **arguments.learning_rate_factors}
        arguments = replace(arguments, learning_rate_factors=factors)
    options = {"save": save_adapted(add_adapters(model, arguments, new_gaussians))} if arguments.lora else {}
    return train_classifier(arguments, accelerator, schedule, splits, model, **options)


def build_model(arguments: FinetuneArguments, label_names: list[str]) -> tuple[PreTrainedModel, bool]:
    """The pretrained model with a classifier for the names of the classes, and whether its Gaussians are new.

    The classifier is a new one unless the checkpoint has these very classes, in this order.

    Raises:
        ValueError: Where the number of classes is given twice and differs, and as `load_pretrained` does.
    """
    values = without_num_labels(arguments.model, label_names)
    if arguments.unfreeze and not arguments.freeze:
        raise ValueError("unfreeze names exceptions to --freeze, which is not given.")
    if arguments.lora and arguments.freeze:
        raise ValueError("lora already freezes all but the adapters, the classifier and new Gaussians: drop --freeze.")
    model, fresh = load_pretrained(AutoModelForImageClassification, arguments.pretrained, values)
    if [model.config.id2label[index] for index in range(model.config.num_labels)] != label_names:
        model = rebuild(model, **label_fields(label_names))
    if arguments.freeze:
        freeze_encoder(model, arguments.unfreeze)
    return model, any(".gaussian." in name for name in fresh)


def freeze_encoder(model: PreTrainedModel, unfreeze: list[str]) -> None:
    """Train the classifier and the parameters whose name contains an entry of `unfreeze`.

    Drop path, dropout and batch norms of the encoder stay as in evaluation.

    Raises:
        ValueError: For an entry that no parameter contains.
    """
    model.base_model.requires_grad_(False)
    for part in unfreeze:
        named = [parameter for name, parameter in model.named_parameters() if part in name]
        if not named:
            raise ValueError(f"unfreeze names {part!r}, but no parameter of the model is called so.")
        for parameter in named:
            parameter.requires_grad_(True)
    model.register_forward_pre_hook(_evaluate_encoder)


def add_adapters(model: PreTrainedModel, arguments: FinetuneArguments, new_gaussians: bool) -> PeftModel:
    """Put low-rank adapters into the model and freeze the rest, but for the classifier and Gaussians that are new.

    Queries and values get them unless `lora.target_modules` says otherwise. The model itself is changed; the object
    that is returned around it can tell the adapters from the rest.

    Raises:
        ValueError: For a field that PEFT does not know, and for targets that are not there.
    """
    whole = ["classifier", *(["gaussian"] if new_gaussians else [])]
    known = {f.name for f in fields(LoraConfig)}
    if unknown := sorted(set(arguments.lora) - known):
        raise ValueError(f"PEFT's LoraConfig has no field {unknown[0]!r}.")
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": whole, **arguments.lora}
    try:
        adapted = get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot adapt the model: {str(error).splitlines()[0]}") from None
    adapted.peft_config["default"].base_model_name_or_path = arguments.pretrained
    return adapted


def save_adapted(adapted: PeftModel) -> Callable[[nn.Module, BaseImageProcessor, Path], None]:
    """How a model with adapters is exported: with the adapters merged into its weights, and beside it in `adapter`."""

    def save(model: nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
        trained = copy.deepcopy(adapted).cpu()
        trained.get_base_model().load_state_dict(model.state_dict())
        trained.save_pretrained(folder / "adapter")
        save_pretrained(trained.merge_and_unload(), processor, folder)

    return save


def _evaluate_encoder(model: PreTrainedModel, inputs: tuple) -> None:
    model.base_model.eval()


if __name__ == "__main__":
    run_program(main, FinetuneArguments)
