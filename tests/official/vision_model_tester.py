"""The tiny model that the test-suite of transformers asks for, once for all families."""

import torch
from transformers import PreTrainedConfig


class VisionModelTester:
    """Builds a tiny config and inputs. A family sets `config_class` and adds its own fields to `config_fields`.

    The attributes are those that the common tests read from any model tester: `seq_length` counts prefix tokens and
    patches, `is_training` switches the training tests on.
    """

    config_class: type[PreTrainedConfig]
    is_training = True
    batch_size = 3
    image_size = 32
    patch_size = 8
    num_channels = 3
    num_labels = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_prefix_tokens = 1
    config_fields: dict[str, object] = {}

    def __init__(self, parent: object) -> None:
        self.parent = parent
        self.seq_length = self.num_prefix_tokens + (self.image_size // self.patch_size) ** 2

    @property
    def embedding_dim(self) -> int:
        """Channels of an embedded patch."""
        return self.hidden_size

    def get_config(self) -> PreTrainedConfig:
        """A config of the tiny model."""
        fields = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_labels": self.num_labels,
        }
        return self.config_class(**fields | self.config_fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """The config and a batch of noise, `pixel_values` (batch, channels, height, width)."""
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape)}
