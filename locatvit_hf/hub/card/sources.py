"""`model_cards/`: what is known of each checkpoint that this project would publish before its weights are."""

from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig, UperNetConfig

from ...utils.io import load_yaml, one_line
from ...utils.registry import FAMILIES
from ..config import family_config, parameter_shapes
from .fields import Card, CardError, build_card, check_type
from .rendering import architecture_of


def read_source(path: Path) -> tuple[PreTrainedConfig, Card]:
    """A file of `model_cards/`: the configuration of the checkpoint, and what its card says before it has weights.

    Beside the fields of a card it holds `family` and `preset`, which name a size of the paper, `architecture`, the
    class of the model, and `model`, further fields of the configuration. Its numbers are by the names of
    protocols.yaml beside it: each one in percent, or several by metric.
    """
    path = Path(path)
    content = read_yaml(path)
    for key in ("family", "preset", "architecture"):
        if not content.get(key):
            raise CardError(f"{path.name} is incomplete: the field {key} is unfilled.")
    for key, kind in {"family": str, "preset": str, "architecture": str, "model": dict[str, Any]}.items():
        check_type(kind, content.get(key) or kind(), f"{path.name}: the field {key}")
    family, preset, architecture = (content.pop(key) for key in ("family", "preset", "architecture"))
    if family not in FAMILIES:
        raise CardError(f"{path.name}: the family {family} is none of {', '.join(FAMILIES)}.")
    fields = {"num_labels": 1000, **(content.pop("model", None) or {})}
    config = FAMILIES[family].config_class.from_preset(preset, **fields)
    if architecture.startswith("UperNet"):
        config.out_indices = list(range(1, len(config.depths) + 1))
        config = UperNetConfig(
            backbone_config=config, auxiliary_in_channels=config.hidden_sizes[2], num_labels=fields["num_labels"]
        )
    config.architectures = [architecture]
    protocols, published = read_yaml(path.with_name("protocols.yaml")), content.pop("published", None) or {}
    check_type(dict[str, Any], published, f"{path.name}: the field published")
    if unknown := published.keys() - protocols.keys():
        raise CardError(f"{path.name}: protocols.yaml beside it has no {sorted(unknown)[0]}.")
    content["published"] = [
        {**protocols[name], "metric": metric, "percent": percent}
        for name, numbers in published.items()
        for metric, percent in (numbers if isinstance(numbers, dict) else {protocols[name]["metric"]: numbers}).items()
    ]
    return config, build_card(content, path.name)


def check_same(config: PreTrainedConfig, expected: PreTrainedConfig, message: str) -> None:
    """Refuse two configurations unless both describe models of one class with the same weights.

    Args:
        config: Of a checkpoint.
        expected: Of what it should be.
        message: The beginning of the sentence.

    Raises:
        CardError: They differ; the message says in what.
    """
    inner, other = family_config(config), family_config(expected)
    # What decides the function without deciding the shape of a weight.
    switches = ("use_refinement", "num_attention_heads", "num_heads", "pooling")
    checks = {
        "its family": (inner.model_type, other.model_type),
        "its class": (architecture_of(config), architecture_of(expected)),
        **{name: (getattr(inner, name, None), getattr(other, name, None)) for name in switches},
    }
    wrong = next((f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in checks.items() if ours != theirs), None)
    if wrong is None and parameter_shapes(config) != parameter_shapes(expected):
        wrong = "its weights have other names or shapes"
    if wrong is not None:
        raise CardError(f"{message}: {wrong}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields in a YAML file.

    Raises:
        CardError: The file cannot be read or holds no fields.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CardError(f"Cannot read the card {path}: {one_line(error)}.") from None
    if not isinstance(content, dict):
        raise CardError(f"{path} is not a card: it holds no fields.")
    return content


__all__ = ["check_same", "read_source", "read_yaml"]
