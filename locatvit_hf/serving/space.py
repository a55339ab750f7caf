"""The page as a Space of the Hub: three files."""

from pathlib import Path

import gradio

from .. import __version__
from ..utils.images import PAGE_MEGAPIXELS
from ..utils.io import atomic_write

APP = """from locatvit_hf.serving import serve

page, _, _ = serve(
    {models!r}, host="0.0.0.0", port=7860, max_megapixels={max_megapixels!r}, prevent_thread_lock=True
)
page.block_thread()
"""
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
models: {models}
---

# {title}

What {named} see, and where they look. Served by locatvit-hf.
"""


def write_space(folder: Path, models: list[str], max_megapixels: float = PAGE_MEGAPIXELS) -> None:
    """Write `app.py`, `requirements.txt` and `README.md`; the folder, uploaded to a Space, runs there.

    Args:
        folder: A new or empty folder.
        models: Hub ids, which the Space downloads.
        max_megapixels: As in `build_app`.

    Raises:
        ValueError: A model is a folder of this machine, which the Space cannot reach, or the folder is not empty.
    """
    for model in models:
        if Path(model).exists() or model.count("/") != 1:
            raise ValueError(f"A Space downloads models from the Hub: {model} is not a Hub id. Push it there first.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for the files of the Space.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "app.py": APP.format(models=models, max_megapixels=max_megapixels),
        "requirements.txt": f"locatvit-hf[serve]=={__version__}\n",
        "README.md": README.format(
            title="Where models look",
            gradio=gradio.__version__,
            models=models,
            named=" and ".join(model.split("/")[1] for model in models),
        ),
    }
    for name, text in files.items():
        atomic_write(folder / name, text)


__all__ = ["write_space"]
