"""Accuracy of a vote of nearest neighbors among the features of the training images; nothing is trained.

accelerate launch -m training.evaluation.knn --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict

from training.data import create_evaluation_loader, load_splits
from training.engine.arguments import option, run_program
from training.evaluation.features import collate_numbered, gather_in_order, load_encoder, pooled_features
from training.evaluation.results import EvaluationArguments, Meter, start_evaluation, write_result
from training.metrics import compute_over_processes, load_metric
from training.tasks.checkpoint_loading import load_processor


@strict
@dataclass(kw_only=True)
class KNNArguments(EvaluationArguments):
    """Settings of `evaluation.knn`; the defaults are the protocol of DINO."""

    k: list[int] = option([10, 20, 100, 200], "Numbers of neighbors, each a result.", least=1)
    temperature: float | int = option(0.07, "A neighbor votes with exp(cosine / this).")


def main(arguments: KNNArguments) -> dict[str, Any]:
    """Vote on the validation split; returns the content of `knn.json`, whose `accuracy` is that of the best k."""
    if not arguments.k:
        raise ValueError("k is empty: give at least one number of neighbors.")
    accelerator = start_evaluation(arguments)
    splits = load_splits(arguments)
    model = load_encoder(str(arguments.pretrained)).to(accelerator.device)
    collate = partial(collate_numbered, load_processor(str(arguments.pretrained), model.config))
    columns = [arguments.image_column, arguments.label_column]
    meter = Meter(accelerator)
    with meter.measure():
        features = []
        for split in (splits.train, splits.validation):
            loader = create_evaluation_loader(split, columns, collate, arguments, accelerator, numbered=True)
            features.append(pooled_features(model, loader, accelerator, meter))
        (train, train_labels, indices), (queries, labels, _) = features
        train, train_labels = gather_in_order(accelerator, indices, train, train_labels)
        metrics: dict[str, float] = {}
        for k in arguments.k:
            metric = load_metric(
                "knn",
                train_features=train,
                train_labels=train_labels,
                k=k,
                temperature=arguments.temperature,
                num_labels=len(splits.label_names or ()),
            )
            metric.add_batch(predictions=queries, references=labels.cpu())
            scores = compute_over_processes(accelerator, metric)
            metrics |= {f"{name}_k{k}": value for name, value in scores.items()}
    best = max(arguments.k, key=lambda k: metrics[f"accuracy_k{k}"])
    metrics = {name: metrics[f"{name}_k{best}"] for name in ("accuracy", "top_5_accuracy")} | metrics
    counts = {"num_train_images": len(train), "num_images": len(splits.validation)}
    return write_result(meter, arguments, metrics, model, k=best, **counts)


if __name__ == "__main__":
    run_program(main, KNNArguments)
