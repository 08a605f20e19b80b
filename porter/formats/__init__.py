"""Number formats in numpy: element codes, blocks, rounding; knows no graph."""

from porter.formats.format import Encoded, Format, parse
from porter.formats.rounding import decode, encode

__all__ = ["Encoded", "Format", "decode", "encode", "parse"]
