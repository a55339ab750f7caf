"""The person who has this package, and uploads checkpoints to the Hub that `HF_ENDPOINT` names.

Started in a process of its own, because the address is read at import::

    python uploader.py FOLDER ANSWER

FOLDER holds `classifier` and `segmenter`, its parent `photo.png`, and the working directory `card.yaml`. ANSWER, a JSON
file, receives what was seen: for each step the text of the terminal, exit statuses, commits and files.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from locatvit_hf import LocAtViTForImageClassification, LocAtViTForSemanticSegmentation, LocAtViTImageProcessor
from locatvit_hf.cli import app
from locatvit_hf.hub import CardCallback
from locatvit_hf.hub.audit import inspect
from locatvit_hf.hub.push import assemble, upload

NAME = "tester/pushed-classifier"
exported, answer = map(Path, sys.argv[1:])
api, terminal, seen = HfApi(), CliRunner(), {}


def locatvit(*arguments: object) -> dict[str, object]:
    run = terminal.invoke(app, [str(argument) for argument in arguments])
    return {"status": run.exit_code, "text": run.output}


def state(revision: str = "main") -> dict[str, object]:
    info = api.model_info(NAME, revision=revision, files_metadata=True)
    return {"commit": info.sha, "files": {file.rfilename: file.blob_id for file in info.siblings}}


# As every model of transformers is pushed; a processor that is there already is kept.
LocAtViTForImageClassification.from_pretrained(exported / "classifier").push_to_hub("tester/locatvit-classifier")
segmenter = LocAtViTForSemanticSegmentation.from_pretrained(exported / "segmenter")
segmenter.push_to_hub("tester/locatvit-segmenter")
processor = LocAtViTImageProcessor.from_model_config(segmenter.config, segmentation=True, do_reduce_labels=True)
processor.push_to_hub("tester/processor-first")
segmenter.push_to_hub("tester/processor-first")
processor.save_pretrained("one-folder")
segmenter.save_pretrained("one-folder", push_to_hub=True, repo_id="tester/one-folder")
seen["reduces labels"] = {}
for name in ("tester/processor-first", "tester/one-folder"):
    LocAtViTForSemanticSegmentation.from_pretrained(name)
    seen["reduces labels"][name] = LocAtViTImageProcessor.from_pretrained(name).do_reduce_labels

folder = Path("cards").resolve()
for name in ("classifier", "segmenter"):
    shutil.copytree(exported / name, folder / name)
    shutil.copy("card.yaml", folder / name)

# Publish, with a tag; look before and after.
seen["dry run"] = locatvit("push", folder / "classifier", NAME, "--dry-run")
seen["exists after the dry run"] = api.repo_exists(NAME)
seen["push"] = locatvit("push", folder / "classifier", NAME, "--tag", "v1")
seen["first"] = state()
seen["info"] = locatvit("info", NAME)

# Other people's leftovers, and other weights: the next upload replaces what it must, in one commit.
for name in ("old.py", "pytorch_model.bin", "figure.png"):
    api.upload_file(path_or_fileobj=b"left over", path_in_repo=name, repo_id=NAME)
seen["leftovers"] = state()
built = Path("built")
built.mkdir()
assemble(folder / "classifier", built, NAME)
weights = load_file(built / "model.safetensors")
(built / "model.safetensors").unlink()
save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, built / "model.safetensors")
proposed = upload(built, NAME, pull_request=True)
seen["pull request"] = {"url": proposed.url, "main": state(), "proposal": state("refs/pr/1")}
changed = upload(built, NAME)
seen["second"] = state() | {"changes": vars(changed.changes)}
again = upload(built, NAME)
seen["again"] = {"commit": again.commit, "changes": vars(again.changes)}
upload(built, NAME, revision="experiment")
seen["branch"] = state("experiment")
seen["v1"] = state("v1")
seen["tag in use"] = locatvit("push", folder / "classifier", NAME, "--tag", "v1")

# A private one for the segmenter; a public one cannot become private on the way.
seen["private"] = locatvit("push", folder / "segmenter", "tester/pushed-segmenter", "--private", "--tag", "v1")
seen["is private"] = api.model_info("tester/pushed-segmenter").private
seen["public"] = locatvit("push", folder / "classifier", NAME, "--private")

# Trainer, with our card.
processor = LocAtViTImageProcessor.from_pretrained(folder / "classifier")
model = LocAtViTForImageClassification.from_pretrained(folder / "classifier")
photo = processor(Image.open(exported.parent / "photo.png"), return_tensors="pt")["pixel_values"]
rows = [{"pixel_values": photo[0] + index, "labels": index % 3} for index in range(4)]
arguments = TrainingArguments(
    "trained", max_steps=2, per_device_train_batch_size=2, save_strategy="no", report_to=[], use_cpu=True,
    push_to_hub=True, hub_model_id="tester/trained", disable_tqdm=True, learning_rate=1e-2,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor,
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)  # fmt: skip
trainer.add_callback(CardCallback(trainer, "me/photos", weights_license="mit"))
trainer.train()
seen["accuracy"] = trainer.evaluate()["eval_accuracy"]
trainer.push_to_hub()
with torch.no_grad():
    seen["logits"] = model.eval()(photo).logits.flatten().tolist()
seen["card"] = Path(api.hf_hub_download("tester/trained", "README.md")).read_text()
seen["files of Trainer"] = api.list_repo_files("tester/trained")

# Somebody changes code and weights of a published checkpoint.
mark = Path("ran").resolve()
shutil.copytree(built, "changed")
code = Path("changed/locat.py")
code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
save_file({name: torch.ones_like(tensor) for name, tensor in weights.items()}, "changed/model.safetensors")
api.upload_folder(repo_id=NAME, folder_path="changed")
found = inspect(NAME)
seen["changed"] = {"alarms": found.alarms, "diffs": found.diffs, "parameters": found.parameters, "ran": mark.exists()}
newest = Path("hf/hub/models--tester--pushed-classifier/snapshots") / found.commit
seen["changed"]["downloaded"] = sorted(path.name for path in newest.iterdir())
answer.write_text(json.dumps(seen))
