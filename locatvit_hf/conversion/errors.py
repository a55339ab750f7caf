"""The one error of this sub-package."""


class ConversionError(ValueError):
    """A checkpoint that cannot become ours. The message is one sentence that names what is wrong and where."""
