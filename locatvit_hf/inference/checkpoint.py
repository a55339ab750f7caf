"""A checkpoint by its folder or Hub id, opened once and loaded with the installed classes: none of its code runs."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel

from ..hub.config import build_config, build_processor, family_config, read_object, weights_of
from ..hub.repository import weight_files
from ..image_processing_locatvit import LocAtViTImageProcessor
from ..utils.io import sha256
from .segmenter import InferenceArguments, Segmenter


class Checkpoint:
    """A checkpoint of this package. Its `config.json` is read once, here; all files come from the same commit.

    Args:
        name: A folder with a `config.json`, or a Hub id.
        revision: A branch, tag or commit of the Hub repository; by default its main branch.

    Attributes:
        commit: The commit of the Hub repository; None for a folder.
        config: The configuration, without what names code or kernels.
        family_config: Its part that is of this package: of the whole model, or of the backbone in one of transformers.
        architecture: The name of the model's class, as `config.json` gives it.

    Raises:
        ValueError: It is not a checkpoint of this package.
        OSError: There is no such checkpoint.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.name, self.commit, self._revision = name, None, revision
        self._folder = Path(name) if Path(name).exists() else None
        try:
            file = self.find_file("config.json")
        except (OSError, ValueError) as error:
            raise OSError(f"There is no checkpoint {name}, neither a folder nor a Hub repository in reach.") from error
        if file is None:
            where = "it is not a folder with a config.json" if self._folder else "its repository has no config.json"
            raise ValueError(f"{name} is not a checkpoint: {where}.")
        if self._folder is None:
            self.commit = self._revision = file.parent.name  # the cache has a folder for each commit
        self.config = build_config(read_object(file), name)
        self.family_config = family_config(self.config)
        self.architecture: str = (self.config.architectures or ["a model without a name"])[0]

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation model."""
        return self.architecture.endswith("ForSemanticSegmentation")

    def find_file(self, name: str) -> Path | None:
        """The path of one of its files, downloaded where it is on the Hub; None where there is no such file."""
        if self._folder is not None:
            return self._folder / name if (self._folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.name, name, revision=self._revision))
        except RemoteEntryNotFoundError:
            return None

    def load_model(
        self,
        auto_class: Any = AutoModel,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> PreTrainedModel:
        """Load the model in evaluation mode.

        Args:
            auto_class: The Auto class of the task, such as `AutoModelForSemanticSegmentation`.
            dtype: Of the weights; by default the one in which they are stored.
            device: By default the GPU where there is one.

        Raises:
            ValueError: The weights are damaged, incomplete, not finite, or of other sizes than those of the model.
        """
        with weights_of(self.name):
            model, loading = auto_class.from_pretrained(
                self.name,
                revision=self.commit,
                config=self.config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(
                f"The weights of {self.name} lack {len(missing)} tensors of the model, such as {missing[0]}."
            )
        plain = [parameter for parameter in model.parameters() if type(parameter.data) is torch.Tensor]  # not quantized
        if not all(parameter.isfinite().all() for parameter in plain):
            raise ValueError(f"The weights of {self.name} hold numbers that are not finite.")
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def load_encoder(self) -> PreTrainedModel:
        """Load the encoder alone, whatever head is on it; see `load_model`."""
        if self.family_config is self.config:
            return self.load_model()
        return self.load_model(AutoModelForSemanticSegmentation).backbone

    def load_processor(self) -> LocAtViTImageProcessor:
        """The image processor that is stored with the model; where there is none, that of its configuration."""
        file = self.find_file("preprocessor_config.json")
        if file is not None:
            return build_processor(read_object(file), self.name)
        return self.create_processor(self.segments)

    def create_processor(self, segmentation: bool = False) -> LocAtViTImageProcessor:
        """The image processor of the configuration, with `segmentation` one that keeps whole images."""
        whole = self.family_config is self.config
        stride = {} if whole else {"output_stride": [1, 1]}  # the logits of UPerNet have the size of the image
        return LocAtViTImageProcessor.from_model_config(self.family_config, segmentation, **stride)

    def load_segmenter(
        self,
        arguments: InferenceArguments | None = None,
        native_size: bool = False,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> Segmenter:
        """Load model and processor for whole images; see `Segmenter` and `load_model` for the arguments.

        Raises:
            ValueError: The checkpoint does not segment, or its weights are not whole, see `load_model`.
        """
        if not self.segments:
            raise ValueError(
                f"{self.name} holds {self.architecture}, which does not segment; `python -m training.segment` gives it "
                "a segmentation head."
            )
        model = self.load_model(AutoModelForSemanticSegmentation, dtype, device)
        return Segmenter(model, self.load_processor(), arguments, native_size)

    def fingerprint(self) -> str:
        """What tells this state of the checkpoint from any other: its commit on the Hub, or a digest of its weights."""
        return self.commit or " ".join(sha256(file) for file in weight_files(Path(self.name)))


__all__ = ["Checkpoint"]
