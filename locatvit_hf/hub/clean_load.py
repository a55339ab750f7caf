"""What the user of a published checkpoint does: transformers, the folder, and no `locatvit_hf`.

A program of its own, started by `repository.verify_repository` and never imported::

    python -I clean_load.py FOLDER CLASS IMAGE INPUTS OUTPUTS [--with-package]

FOLDER is loaded by CLASS, the name of a class of transformers. OUTPUTS, a safetensors file, receives `output`, what the
model makes of `pixel_values` in the safetensors file INPUTS, and `pixel_values`, what the processor makes of IMAGE.
With `--with-package` the package is imported first, for models of transformers around one of our backbones.
"""

import importlib.abc
import sys


class Absent(importlib.abc.MetaPathFinder):
    """Makes the package unimportable, also where it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "locatvit_hf":
            raise ImportError("locatvit_hf is not installed here.")


folder, class_name, image, inputs, outputs, *options = sys.argv[1:]
if not options:
    sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

if options:
    import locatvit_hf  # noqa: F401

processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = getattr(transformers, class_name).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    output = model(load_file(inputs)["pixel_values"])[0]
found = {"output": output, "pixel_values": processor(Image.open(image), return_tensors="pt")["pixel_values"]}
save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)
