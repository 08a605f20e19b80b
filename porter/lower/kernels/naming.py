"""Names of number formats, as porter's users know them, for what kernels read."""

from __future__ import annotations

import functools

from porter import formats
from porter.formats.elements import FP8
from porter.formats.wide import WIDE
from porter.lower.kernels.layout import Layout


def format_of(codec: str) -> str:
    """The format of a codec's elements: e4m3fn -> fp8-e4m3fn."""
    return f"fp8-{codec}" if codec in FP8 else codec


def format_name(layout: Layout) -> str:
    """The format of a packed weight, with what shares a scale: int4-g32, fp8-e4m3fn, mxfp4.

    One that porter has no name for (an MX element under scales of its own) is called by the first format
    with its element, whose numbers are the same, and its group.
    """
    if layout.codec_name in WIDE:
        return layout.codec_name
    blocks = _blocks()
    group = layout.group if layout.group < layout.k else 0
    for name, form in blocks.items():
        same = (form.element, form.scale, form.micro) == (layout.codec_name, layout.scale, layout.micro)
        if same and layout.group == min(form.group, layout.k) and not layout.zero:
            return name
    share = "-t" if layout.rows == 0 and not group else f"-g{group}" if group else ""
    if group and layout.rows == group:
        share = f"-b{group}"
    if layout.codec_name.startswith(("int", "uint")) or layout.codec_name in FP8:
        return format_of(layout.codec_name) + share
    return next((n for n, f in blocks.items() if f.element == layout.codec_name), layout.codec_name) + share


@functools.cache
def _blocks() -> dict[str, formats.Format]:
    """The formats whose scales are not float32."""
    scaled = ("int", "uint", "fp8-")  # with a float32 scale for what a suffix says
    names = [name for name in formats.names() if not name.startswith(scaled) and name not in WIDE]
    return {name: formats.parse(name) for name in names}
