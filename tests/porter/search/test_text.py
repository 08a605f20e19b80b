"""An assignment's text is a pipeline that names just its weights."""

from __future__ import annotations

from porter.passes.kv.quantize import QuantizeCache
from porter.passes.quantize.kquant import KQuant
from porter.passes.quantize.rtn import RoundToNearest

from porter.kv.names import parse
from porter.kv.scheme import Side
from porter.pipeline import Pipeline
from porter.search import text
from porter.search.choices import Assignment, Item, Option
from porter.weights import select

INT4 = KQuant(format="int4-g32", skip=(), scales="fp16")
FP8 = RoundToNearest(format="fp8-e4m3fn", skip=())


def weight(name: str, cast: KQuant | RoundToNearest | None) -> Item:
    return Item(name, "weight", 8, (Option("x", 4, 0.0, (0.0,), cast),))


def assigned(*items: Item) -> Assignment:
    return Assignment(items, (0,) * len(items))


def test_weights_of_one_format_are_one_pass_and_what_stays_is_not_named() -> None:
    made = text.weights_text(
        assigned(weight("b", INT4), weight("a", INT4), weight("c", None), weight("d", FP8))
    )
    pipeline = Pipeline.parse(made)
    assert {(p.format, p.only, p.skip) for p in pipeline.passes} == {
        ("int4-g32", ("a", "b"), ()),
        ("fp8-e4m3fn", ("d",), ()),
    }
    assert str(pipeline) == made
    assert text.weights_text(assigned(weight("c", None))) == ""


def test_names_that_a_text_cannot_hold_are_still_named_alone() -> None:
    names = ["w [0]*", "head", "a+b,{c}=d", "plain.weight", "linear"]
    for name in names:
        made = text.weights_text(assigned(weight(name, INT4)))
        (read,) = Pipeline.parse(made).passes
        assert text.named(name, names)
        roles = (*select.ROLES, "linear")
        assert [n for n in names if any(w not in roles and _fits(n, w) for w in read.only)] == [name]
    assert not text.named("a b", ["a b", "a+b"])


def _fits(name: str, word: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, word)


def side(kind: str, layer: int, form: Side) -> Item:
    return Item(f"past.{layer}.{kind}", kind, 8, (Option("x", 4, 0.0, (0.0,), side=form),), layer)  # type: ignore[arg-type]


def test_a_cache_has_its_layers_in_order() -> None:
    int8, int4 = Side("int8"), Side("int4", group=32, scale="fp16")
    made = text.kv_text(assigned(
        side("value", 1, int8), side("key", 1, Side("fp32")), side("key", 0, int8), side("value", 0, int4)
    ))  # fmt: skip
    (read,) = Pipeline.parse(made).passes
    assert isinstance(read, QuantizeCache)
    assert str(read) == made
    assert read.parsed().layers == ((int8, int4), (Side("fp32"), int8))
    assert parse("layers=int8/int4-g32-fp16:fp32/int8").layers == read.parsed().layers
    exact = [side(kind, 0, Side("fp32")) for kind in ("key", "value")]
    assert text.kv_text(assigned(*exact)) == ""
