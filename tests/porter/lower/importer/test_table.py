"""The names that need no TVM agree with the importer's table."""

from porter.lower.importer.linear import FLOAT_CODECS
from porter.lower.importer.program import DTYPES
from porter.lower.importer.quantized import CODEC_OF
from porter.lower.importer.table import TABLES
from porter.lower.supported import OPERATORS, TYPES


def test_operators() -> None:
    assert set(TABLES[""]) | {f"porter.{name}" for name in TABLES["porter"]} == OPERATORS


def test_types() -> None:
    assert {t.name for t in (*DTYPES, *CODEC_OF)} == TYPES
    assert set(FLOAT_CODECS) <= set(DTYPES)
