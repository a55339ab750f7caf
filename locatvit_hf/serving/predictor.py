"""What one checkpoint says about one image, ready to be shown."""

import html
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification

from ..inference import Checkpoint
from ..utils.colors import background_class, class_colors, overlay_segmentation
from ..visualization import build_report, read_layers
from ..visualization.figures import default_layer, default_queries

LARGEST_SIDE = 1600
"""Pixels; a telephone takes images of three times that, which no model here looks at."""

LONGEST_LEGEND = 12
"""Classes that a legend names, those with the most pixels."""

# Tells the page around the frame how tall this one is; it is barred from everything else.
REPORT_HEIGHT = """<script>
new ResizeObserver(() => parent.postMessage({locatvitHeight: document.documentElement.offsetHeight}, "*"))
  .observe(document.documentElement);
</script>"""


class Predictor:
    """A checkpoint, loaded once with the installed classes: none of its own code runs.

    Args:
        name: A folder or a Hub id.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: It is not a checkpoint of this package.
    """

    def __init__(self, name: str):
        self.name = Path(name).name if Path(name).exists() else name
        checkpoint = Checkpoint(name)
        self.classifies = checkpoint.architecture.endswith("ForImageClassification")
        self.segmenter = checkpoint.load_segmenter() if checkpoint.segments else None
        if self.segmenter is not None:
            self.model, self.processor = self.segmenter.model, self.segmenter.processor
        else:
            self.model = checkpoint.load_model(AutoModelForImageClassification if self.classifies else AutoModel)
            self.processor = checkpoint.load_processor()
        # Layers are looked at on the whole image, also where the classifier crops it.
        self.whole_images = checkpoint.create_processor(segmentation=True)
        self.encoder = getattr(self.model, "backbone", self.model.base_model)

    @torch.inference_mode()
    def classify(self, image: Image.Image) -> dict[str, float]:
        """The probability of each class, by its name."""
        pixels = self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.device)
        probabilities = self.model(pixel_values=pixels).logits[0].float().softmax(dim=-1)
        return {self.model.config.id2label[label]: share for label, share in enumerate(probabilities.tolist())}

    def segment(self, image: Image.Image) -> tuple[Image.Image, str]:
        """The image with its classes in color, and a legend in HTML: color, name and fraction of the pixels."""
        if self.segmenter is None:
            raise ValueError(f"{self.name} does not segment images.")
        label_map = self.segmenter([image])[0]
        names = self.segmenter.id2label
        colors = class_colors(names)
        fractions = {label: float((label_map == label).mean()) for label in names}
        largest = sorted((label for label in names if fractions[label]), key=lambda label: -fractions[label])
        rows = "".join(
            f'<li><span style="background: rgb{tuple(map(int, colors[label]))}"></span>'
            f"{html.escape(names[label])}<b>{fractions[label]:.0%}</b></li>"
            for label in largest[:LONGEST_LEGEND]
        )
        more = len(largest) - LONGEST_LEGEND
        legend = f'<ul class="legend">{rows}</ul>' + (f"<p>and {more} smaller ones</p>" if more > 0 else "")
        background = background_class(names)
        return overlay_segmentation(image, label_map, colors, background=background, ignore_index=None), legend

    def look(self, image: Image.Image) -> str:
        """A frame in which pointing at a patch shows what it attends to; it needs no further answer from here."""
        layers = read_layers(self.encoder, self.whole_images(image, return_tensors="pt")["pixel_values"])
        index = default_layer(layers)
        page = build_report("Where it looks", image, {self.name: layers}, index, default_queries(layers[index])[0])
        page = html.escape(page.replace("</body>", f"{REPORT_HEIGHT}</body>"))
        title = f"Where {html.escape(self.name)} looks"
        return f'<iframe class="look" title="{title}" sandbox="allow-scripts" srcdoc="{page}"></iframe>'


__all__ = ["LARGEST_SIDE", "Predictor"]
