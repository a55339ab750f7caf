"""Training steps of every family in half precision: is anything not finite, and do the attention functions agree?"""

import torch
import torch.nn.functional as F

from locatvit_hf.utils.registry import FAMILIES

from .cells import Family
from .contenders import Contenders
from .device import Processor
from .speed import no_fallback

STEPS = 3
# Of two first losses from the same weights, relative: each is near ln(classes) and comes from logits of a few bits.
AGREE = {"bfloat16": 2e-2, "float16": 4e-3}


def train(cell: Family, without: tuple[str, ...], device: Processor, tell) -> dict:
    """A few steps with AdamW, in float16 with a gradient scaler, of every attention function from the same weights.

    Returns:
        A record: `contenders`, by name `losses` of the steps, `gradient_norms`, `skipped` (steps that the scaler left
        out while it looked for its scale) and `finite`; `passed`: all finite and the first losses alike.
    """
    entries = Contenders([name for name in cell.contenders if name not in without], device, tell)
    entries.attempt(lambda name, record: record.update(steps(cell, name, device)))
    losses = {name: record["losses"][0] for name, record in entries.records.items() if "losses" in record}
    first = next(iter(losses.values()), 0.0)
    alike = all(abs(loss - first) <= AGREE[cell.dtype] * abs(first) for loss in losses.values())
    complete = len(losses) == len(cell.contenders)
    passed = complete and alike and all(entries.records[name]["finite"] for name in losses)
    return {**entries.record(), "passed": passed}


def steps(cell: Family, attention: str, device: Processor) -> dict:
    """The record of one attention function."""
    torch.manual_seed(0)
    family = FAMILIES[cell.family]
    config = family.config_class.from_preset("tiny", num_labels=1000, **{"drop_path_rate": 0.0, **cell.overrides})
    model = family.models["AutoModelForImageClassification"](config)
    model.config._attn_implementation = attention
    model = model.to(device.name).train()
    pixels = torch.randn(cell.batch, 3, cell.image_size, cell.image_size).to(device.name)
    labels = torch.randint(1000, (cell.batch,)).to(device.name)
    dtype = getattr(torch, cell.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device.name, enabled=dtype == torch.float16)
    losses, norms, skipped = [], [], 0
    while len(norms) < STEPS and skipped < 20:
        optimizer.zero_grad()
        with no_fallback(), torch.autocast(device.name, dtype):
            logits = model(pixels).logits
        loss = F.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        ).item()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if scaler.is_enabled() and scaler.get_scale() < scale:
            skipped += 1  # the scale was too high for float16, which is how it is found
        else:
            norms.append(norm)
    finite = len(norms) == STEPS and bool(torch.tensor(losses + norms).isfinite().all())
    return {"losses": losses, "gradient_norms": norms, "skipped": skipped, "finite": finite}
