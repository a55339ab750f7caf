"""The author: has the package and pushes its models to the Hub that `HF_ENDPOINT` names.

Started in a process of its own, because the address is read at import::

    python publisher.py FOLDER NAMESPACE/PREFIX
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from locatvit_hf import LocAtViTForImageClassification, LocAtViTForSemanticSegmentation

folder, prefix = Path(sys.argv[1]), sys.argv[2]
LocAtViTForImageClassification.from_pretrained(folder / "classifier").push_to_hub(f"{prefix}-classifier")
LocAtViTForSemanticSegmentation.from_pretrained(folder / "segmenter").push_to_hub(f"{prefix}-segmenter")
