"""Number formats in numpy: element codes, blocks, rounding, packing; knows no graph."""

from porter.formats.format import Encoded, Format, Scales, names, parse
from porter.formats.rounding import decode, encode, nearest

__all__ = ["Encoded", "Format", "Scales", "decode", "encode", "names", "nearest", "parse"]
