"""The names that check.support goes by are the importer's."""

from porter.lower import supported, tvm_setup
from porter.lower.importer.table import TABLES


def test_the_operators_are_those_of_the_importer() -> None:
    known = {f"{domain}.{name}" if domain else name for domain, table in TABLES.items() for name in table}
    assert known == supported.OPERATORS
