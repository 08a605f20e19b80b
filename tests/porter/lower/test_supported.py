"""The names that check.support goes by are the importer's."""

from porter.lower import supported, tvm_setup  # noqa: F401  (before anything of TVM)
from porter.lower.importer.constants import CODEC_OF
from porter.lower.importer.linear import FLOAT_CODECS
from porter.lower.importer.program import DTYPES
from porter.lower.importer.table import PREFIXES, TABLES


def test_the_operators_are_those_of_the_importer() -> None:
    known = {f"{domain}.{name}" if domain else name for domain, table in TABLES.items() for name in table}
    assert known == supported.OPERATORS
    assert sorted(f"porter.{prefix}" for prefix in PREFIXES) == sorted(supported.PREFIXES)


def test_the_types_are_those_of_the_importer() -> None:
    assert {kind.name for kind in (*DTYPES, *CODEC_OF)} == supported.TYPES
    assert set(FLOAT_CODECS) <= set(DTYPES)
