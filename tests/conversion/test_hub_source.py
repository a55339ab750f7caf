"""SOURCE as a Hub id, through a Hub on this machine."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel

from locatvit_hf import LocAtViTForImageClassification, LocAtViTModel
from tests.conversion.layouts import write_run, write_timm
from tests.golden import load_case
from tests.remote.conftest import serve_hub, start

ROOT = Path(__file__).resolve().parents[2]
# One process: the address of the Hub is read when huggingface_hub is imported.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from huggingface_hub import HfApi
from locatvit_hf import LocAtViTModel
from locatvit_hf.cli import app

for name in ("timm", "run", "vit"):
    HfApi().create_repo(f"tester/{name}")
    HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=Path(sys.argv[2], name))
app(["convert", "tester/timm", "from_timm"], standalone_mode=False)
app(["convert", "hf-hub:tester/run", "from_run", "--ema"], standalone_mode=False)
assert app(["convert", "tester/nothing", "from_nothing"], standalone_mode=False) == 1
LocAtViTModel.from_vit("tester/vit").save_pretrained("from_vit")
"""


@torch.no_grad()
def test_hub_ids_are_sources(tmp_path):
    case = load_case("locatvit_reg4")
    write_timm(case, tmp_path / "timm")
    write_run(case, tmp_path / "run")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vit = ViTModel(ViTConfig(intermediate_size=64, **sizes)).eval()
    vit.save_pretrained(tmp_path / "vit")
    machine = tmp_path / "machine"
    machine.mkdir()
    with serve_hub() as hub:
        start(machine, hub, "-c", PROGRAM, ROOT, tmp_path)

    model = LocAtViTForImageClassification.from_pretrained(machine / "from_timm").eval()
    assert case.error("0.logits", model(case.input(0)).logits) < 1e-5
    average = LocAtViTForImageClassification.from_pretrained(machine / "from_run")
    torch.testing.assert_close(average.classifier.weight, case.state["head.weight"] + 0.01)
    assert not (machine / "from_nothing").exists()
    pixel_values = torch.randn(1, 3, 32, 32)
    started = LocAtViTModel.from_pretrained(machine / "from_vit")
    expected = vit(pixel_values).last_hidden_state
    torch.testing.assert_close(started(pixel_values).last_hidden_state, expected, atol=1e-3, rtol=0)
