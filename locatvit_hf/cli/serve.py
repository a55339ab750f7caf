"""`locatvit serve --model M`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..utils.images import PAGE_MEGAPIXELS
from .console import MaxMegapixels, console, friendly_errors, silence_transformers


@friendly_errors
def serve(
    model: Annotated[
        list[str], typer.Option(help="A checkpoint: a folder or a Hub id. Twice, and they stand side by side.")
    ],
    examples: Annotated[Path | None, typer.Option(help="A folder of images to begin with.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option(help="Open a public link through gradio's servers.")] = False,
    max_megapixels: MaxMegapixels = PAGE_MEGAPIXELS,
    space: Annotated[Path | None, typer.Option(help="Write the files of a Hub Space here instead of serving.")] = None,
) -> None:
    """Open a page that classifies and segments images and shows where each patch looks."""
    try:
        from ..serving import serve as serve_page
        from ..serving import write_space
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ValueError("The page needs gradio: pip install 'locatvit-hf[serve]'") from error

    silence_transformers()
    if space is not None:
        write_space(space, model, max_megapixels)
        console.print(f"Upload it to a Space: [bold]hf upload --repo-type space YOU/NAME {escape(str(space))}[/bold]")
        return
    page, address, public = serve_page(model, examples, host, port, share, max_megapixels, prevent_thread_lock=True)
    console.print(f"Open [bold]{public or address}[/bold] in a browser; Ctrl+C ends it.")
    page.block_thread()


__all__ = ["serve"]
