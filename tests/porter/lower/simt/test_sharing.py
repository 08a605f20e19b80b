"""What is computed twice is computed once, and what a choice guards stays guarded."""

from tvm import tirx

from porter.lower.simt.sharing import shared

X = tirx.Var("x", "float32")
BUFFER = tirx.decl_buffer((8,), "float32", "table", layout=None)
AT = tirx.Var("i", "int32")
LOAD = tirx.BufferLoad(BUFFER, [AT])


def test_a_repeated_expression_gets_a_name() -> None:
    again = [X * X + X for _ in range(2)]  # two objects, one expression
    binds, value = shared(again[0] * again[1], "t")
    assert [str(b.var.name) for b in binds] == ["t0"]
    assert str(value) == "t0 * t0"


def test_a_guarded_load_is_not_moved_before_its_guard() -> None:
    guarded = tirx.if_then_else(AT < 8, LOAD * LOAD + LOAD * LOAD, tirx.FloatImm("float32", 0))
    binds, _ = shared(guarded, "t")
    assert binds == []


def test_a_choice_that_is_made_anyway_is_made_once() -> None:
    choice = tirx.if_then_else(AT < 8, LOAD, tirx.FloatImm("float32", 0))
    binds, value = shared(choice + choice * choice, "t")
    assert len(binds) == 1
    assert "if_then_else" in str(binds[0].value)
    assert "table" not in str(value)


def test_a_load_that_is_read_anyway_may_be_shared_with_a_guarded_one() -> None:
    value = tirx.exp(LOAD) + tirx.if_then_else(AT < 3, tirx.exp(LOAD), X)
    binds, _ = shared(value, "t")
    assert len(binds) == 1
