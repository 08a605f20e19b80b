"""KV-cache schemes in numpy: their data, their bytes, and what they compute; knows no graph."""

from porter.kv.attention import attend, attend_cache
from porter.kv.cache import Cache
from porter.kv.constants import Constants, calibrated
from porter.kv.layout import Buffer, bits_per_value, buffers, bytes_of
from porter.kv.names import PRESETS, parse, text_of
from porter.kv.scheme import Scheme, Side

__all__ = [
    "PRESETS",
    "Buffer",
    "Cache",
    "Constants",
    "Scheme",
    "Side",
    "attend",
    "attend_cache",
    "bits_per_value",
    "buffers",
    "bytes_of",
    "calibrated",
    "parse",
    "text_of",
]
