"""The page: an image on one side, what one or two models make of it on the other."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from PIL import Image

from ..utils.images import PAGE_MEGAPIXELS, CorruptImageError, list_images, read_image, remark_on_frames
from .predictor import LARGEST_SIDE, Predictor
from .sample_images import draw_sample_images

NOBODY = "nobody"
LARGEST_FILE = "20mb"
MAX_WAITING = 8
"""Requests that wait for the models, a second or two each on CPU; gradio answers others that the page is busy."""
FONTS = ["system-ui", "sans-serif"]  # of the reader's own machine: nothing is fetched from elsewhere
THEME = gr.themes.Base(primary_hue="teal", font=FONTS, font_mono=["ui-monospace", "monospace"])
CSS = """
.legend { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.3rem 1.2rem;
          grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.legend li { display: flex; align-items: center; gap: 0.5rem; }
.legend span { width: 1em; height: 1em; border-radius: 3px; flex: none; }
.legend b { margin-left: auto; font-weight: 500; opacity: 0.7; }
iframe.look { width: 100%; height: 40rem; border: 0; border-radius: 8px; background: white; }
"""
# Each frame reports its height; a message from elsewhere finds no frame that sent it.
HEAD = """<script>
addEventListener("message", event => {
  for (const frame of document.querySelectorAll("iframe.look"))
    if (event.source === frame.contentWindow && event.data.locatvitHeight > 0)
      frame.style.height = event.data.locatvitHeight + "px";
});
</script>"""


def build_app(models: list[str], examples: Path | None = None, max_megapixels: float = PAGE_MEGAPIXELS) -> gr.Blocks:
    """Build the page; `serve` launches it with its style.

    Args:
        models: Folders or Hub ids; the first answers, and the second, where there is one, beside it.
        examples: A folder of images to begin with; by default a few drawings.
        max_megapixels: Larger images are refused before their pixels are decoded.

    Returns:
        The page as Blocks of gradio.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: No model is named, one is not a checkpoint of this package, or the folder holds no images.
    """
    if not models:
        raise ValueError("Name at least one checkpoint to serve.")
    predictors = {}
    for model in dict.fromkeys(models):
        predictor = Predictor(model)
        if predictor.name in predictors:
            predictor.name = model
        predictors[predictor.name] = predictor
    names = list(predictors)

    def show(path: str | None, first: str, second: str) -> list:
        """Updates for both columns."""
        shown = [first, second if second != first else NOBODY]
        if path is None:
            return [update for _ in shown for update in _answers(None, None)]
        try:
            image = read_image(path, "This file", max_megapixels)
        except (CorruptImageError, OSError) as error:
            raise gr.Error(str(error), title="No image", print_exception=False) from error
        for sentence in remark_on_frames("This file", image):
            gr.Warning(sentence, title="One of several")
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        return [update for name in shown for update in _answers(predictors.get(name), image)]

    # Uploads are deleted after an hour or two.
    with gr.Blocks(title="locatvit", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown("## What is in an image, and where\nPoint at a patch, or tap it, to see what it attends to.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(label="Image", sources=["upload", "clipboard", "webcam"], height=300)
                # The file as it was uploaded: reading it, and saying why that fails, is `show`'s.
                image.preprocess = lambda payload: payload and payload.path
                several = len(names) > 1
                first = gr.Dropdown(names, value=names[0], label="Model", visible=several, interactive=True)
                second = gr.Dropdown(
                    [NOBODY, *names],
                    value=names[1] if several else NOBODY,
                    label="Beside it",
                    visible=several,
                    interactive=True,
                )
                gr.Examples([[str(path)] for path in _examples(examples)], image, label="Examples")
            with gr.Column(scale=3, min_width=300), gr.Row():
                columns = [_build_column() for _ in range(2)]
        inputs, outputs = [image, first, second], [part for column in columns for part in column]
        for event in (image.change, first.input, second.input):
            event(show, inputs, outputs, show_progress="minimal", concurrency_limit=1, concurrency_id="models")
    return page.queue(max_size=MAX_WAITING)


def _build_column() -> list[gr.blocks.Block]:
    with gr.Column(min_width=300, visible=False) as column:
        heading = gr.Markdown()
        classes = gr.Label(num_top_classes=5, show_label=False, visible=False)
        overlay = gr.Image(show_label=False, interactive=False, visible=False, buttons=["download", "fullscreen"])
        legend = gr.HTML(visible=False)
        look = gr.HTML(visible=False)
    return [column, heading, classes, overlay, legend, look]


def _answers(predictor: Predictor | None, image: Image.Image | None) -> list:
    """Updates for the parts of a column, in the order of `_build_column`."""
    if predictor is None or image is None:
        return [gr.update(visible=False)] + [gr.update(value=None)] * 5
    hidden = gr.update(value=None, visible=False)
    classes, overlay, legend = hidden, hidden, hidden
    if predictor.classifies:
        classes = gr.update(value=predictor.classify(image), visible=True)
    if predictor.segmenter is not None:
        colored, names = predictor.segment(image)
        overlay, legend = gr.update(value=colored, visible=True), gr.update(value=names, visible=True)
    look = gr.update(value=predictor.look(image), visible=True)
    return [gr.update(visible=True), gr.update(value=f"### {predictor.name}"), classes, overlay, legend, look]


def _examples(folder: Path | None) -> list[Path]:
    if folder is None:
        drawings = tempfile.mkdtemp(prefix="locatvit-examples-")
        atexit.register(shutil.rmtree, drawings, ignore_errors=True)
        return draw_sample_images(Path(drawings))
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with images to begin with.")
    found = [folder / name for name in list_images(folder).images if "/" not in name]
    if not found:
        raise ValueError(f"{folder} holds no images to begin with.")
    return found


def serve(
    models: list[str],
    examples: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    max_megapixels: float = PAGE_MEGAPIXELS,
    **options: Any,
) -> tuple[gr.Blocks, str, str | None]:
    """Build the page and serve it.

    Args:
        models: As in `build_app`.
        examples: As in `build_app`.
        host: The address to listen on; 0.0.0.0 lets other machines in.
        port: By default the first free one from 7860.
        share: Open a public link through the servers of gradio.
        max_megapixels: As in `build_app`.
        options: Further arguments of `gradio.Blocks.launch`.

    Returns:
        The page, its address, and its public link if it is shared.

    Raises:
        OSError: There is no such checkpoint, or the port is taken.
        ValueError: As in `build_app`.
    """
    page = build_app(models, examples, max_megapixels)
    _, address, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=THEME,
        css=CSS,
        head=HEAD,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        quiet=True,
        **options,
    )
    return page, address, public


__all__ = ["build_app", "serve"]
