"""The families of models: one entry each, which every tool reads. `docs/extend.md` adds one."""

import importlib
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_locatjumbo import LocAtJumboConfig
from ..configuration_locatswin import LocAtSwinConfig
from ..configuration_locatvit import LocAtViTConfig
from ..configuration_pacavit import PaCaViTConfig
from .papers import JUMBO, PACA, SWIN, VIT, Paper

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of remote code."""


class Family(NamedTuple):
    """A family of models: `configuration_TYPE.py` and `modeling_TYPE.py`, where TYPE is its model type.

    Attributes:
        config_class: Its configuration, whose `class_prefix` begins the names of its models.
        description: What it is, as a card says after "A" and "A plain".
        paper: Where that was published.
        converter: The module of `locatvit_hf.conversion` that reads weights of other code; None where there is none.
    """

    config_class: type[PreTrainedConfig]
    description: str
    paper: Paper
    converter: str | None = None

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto class of transformers -> module and class, as config.json of its checkpoints has it."""
        return self.config_class().auto_map

    @property
    def models(self) -> dict[str, type[PreTrainedModel]]:
        """Auto class of transformers, such as "AutoModel" -> the class that it loads."""
        paths = {name: path.split(".") for name, path in self.auto_map.items() if name != "AutoConfig"}
        return {
            name: getattr(importlib.import_module(f"{PACKAGE.name}.{module}"), model)
            for name, (module, model) in paths.items()
        }

    @property
    def code_files(self) -> list[str]:
        """The Python files that its checkpoints carry, in the order of their names."""
        modules = {path.partition(".")[0] for path in self.auto_map.values()}
        return files_with_imports(*modules, "image_processing_locatvit")


FAMILIES: dict[str, Family] = {
    family.config_class.model_type: family
    for family in (
        Family(LocAtViTConfig, "vision transformer", VIT, converter="locatvit"),
        Family(LocAtSwinConfig, "Swin transformer", SWIN, converter="locatswin"),
        Family(
            LocAtJumboConfig,
            "Jumbo vision transformer, whose class token is several tokens wide",
            JUMBO,
            converter="locatjumbo",
        ),
        Family(
            PaCaViTConfig,
            "PaCa-ViT, a vision transformer whose patches attend to learned clusters of patches",
            PACA,
            converter="pacavit",
        ),
    )
}
"""Model type -> family."""


def files_with_imports(*modules: str) -> list[str]:
    """The files of these modules of remote code and of all that they import, in the order of their names."""
    found = {PACKAGE / f"{module}.py" for module in modules}
    for file in list(found):
        found.update(Path(imported) for imported in get_relative_import_files(file))
    return sorted(file.name for file in found)


__all__ = ["FAMILIES", "PACKAGE", "Family", "files_with_imports"]
