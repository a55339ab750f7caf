"""Our card from the Trainer of transformers."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import __version__
from .card import PIPELINES, Card, Result, Training, metrics_of, write_card
from .repository import license_text


class CardCallback(TrainerCallback):
    """Writes our card and the license into the output folder before each push, in place of Trainer's own card::

        trainer = Trainer(...)
        trainer.add_callback(CardCallback(trainer, dataset="me/photos", weights_license="mit"))
        trainer.train()
        trainer.push_to_hub()

    Args:
        trainer: The one that pushes.
        dataset: What the weights learn from and are evaluated on, a Hub name where it has one.
        weights_license: As the Hub abbreviates it, such as "mit".
        split: Of the data that Trainer evaluates on.
        facts: Further fields of the card, as `base_model`; see `card.Card`.

    Raises:
        ValueError: A card has no such field, or the model has no task: now, not at the first push.
    """

    def __init__(self, trainer: Trainer, dataset: str, weights_license: str, split: str = "validation", **facts: Any):
        if unknown := sorted(set(facts) - {field.name for field in dataclasses.fields(Card)}):
            raise ValueError(f"A card has no field {unknown[0]!r}.")
        architecture = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
        if not architecture.endswith(tuple(PIPELINES)):
            raise ValueError(f"A card describes a model with a head or a bare one, not {architecture}.")
        facts["weights_license"] = weights_license
        self.trainer, self.dataset, self.split, self.facts = trainer, dataset, split, facts
        trainer.create_model_card = lambda *args, **kwargs: None  # it would overwrite ours

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Write configuration, license and card into the output folder."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
            write_card(folder, self._card(args, state, type(model).__name__))

    def _card(self, args: TrainingArguments, state: TrainerState, architecture: str) -> Card:
        repository = self.trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).name
        task = next(pipeline for ending, pipeline in PIPELINES.items() if architecture.endswith(ending))
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        evaluations = [row for row in state.log_history if any(name.startswith("eval_") for name in row)]
        last = evaluations[-1] if evaluations else {}
        metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
        fields: dict[str, Any] = {
            "title": repository.split("/")[-1],
            "repository": repository,
            "revision": args.hub_revision or "main",
            "datasets": [self.dataset],
            "training": Training(
                program="Trainer",
                version=__version__,
                updates=state.max_steps,
                step=state.global_step,
                batch_size=batch_size,
                processes=args.world_size,
                start=self.facts.get("base_model"),
            ),
            "results": [
                Result(
                    task=task,
                    dataset=self.dataset,
                    split=self.split,
                    metric=name,
                    value=value,
                    protocol=f"by Trainer, at step {last['step']}",
                )
                for name, value in metrics_of(metrics).items()
            ],
        }
        return Card(**fields | self.facts)


__all__ = ["CardCallback"]
