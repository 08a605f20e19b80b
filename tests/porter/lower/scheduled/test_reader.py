"""Scheduled TIR as the simulator's program: kernels of this file's own, and those that porter schedules."""

from __future__ import annotations

import numpy as np
import pytest

from porter import target
from porter.errors import TargetError
from porter.lower import scheduled
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.vector import rms_norm
from porter.lower.kernels.layout import Layout
from porter.lower.tile import schedule as tile
from porter.simulate import Call, Copy, Matrix, Program, Vector, simulate
from porter.simulate.program import Loop, Node, When
from porter.simulate.step import CONTROL
from porter.target import TargetSpec
from tests.support import stepped
from tests.support.chips import chip

from tvm import IRModule, relax, te, tirx  # isort: skip
from tvm.s_tir import Schedule  # isort: skip

M, N, K = 9, 10, 11


def matmul(tile_sizes: tuple[int, int, int], slots: int = 2, *, cores: bool = True) -> Schedule:
    """y [m, N] = x [m, K] W[N, K] in tiles, ragged at every edge: loads, products, moves and stores."""
    tm, tn, tk = tile_sizes
    m = tirx.Var("m", "int64")
    x, w = te.placeholder((m, K), "float16", name="x"), te.placeholder((N, K), "float16", name="w")
    k = te.reduce_axis((0, K), name="k")
    y = te.compute(
        (m, N),
        lambda i, j: te.sum(x[i, k].astype("float32") * w[j, k].astype("float32"), axis=k),
        name="product",
    )
    s = Schedule(te.create_prim_func([x, w, y]))
    product = s.get_sblock("product")
    i, j, kk = s.get_loops(product)
    (i0, i1), (j0, j1), (k0, k1) = (
        s.split(loop, [None, size]) for loop, size in ((i, tm), (j, tn), (kk, tk))
    )
    s.reorder(i0, j0, k0, i1, j1, k1)
    store = s.cache_write(product, 0, "global.sram")
    move = s.cache_write(product, 0, "global.acc")
    s.reverse_compute_at(move, j0)
    s.reverse_compute_at(store, j0)
    loads = [s.cache_read(product, number, "global.sram") for number in (0, 1)]
    for load in loads:
        s.compute_at(load, k0)
    if cores:
        s.annotate(s.fuse(i0, j0), "porter.cores", 1)
    init = s.decompose_reduction(product, k0)
    s.annotate(init, "porter.free", 1)
    for block in (*loads, store):
        s.annotate(block, "porter.copy", "hbm")
    for block in (*loads, init, move):
        s.annotate(block, "porter.slots", slots)
    s.annotate(move, "porter.vector", 1)
    s.annotate(s.get_sblock("product_update"), "porter.matrix", "bf16")
    return s


def operations(program: Program, kind: type) -> list:
    """The operations of one kind, in order."""
    found: list = []

    def walk(nodes: tuple[Node, ...]) -> None:
        for node in nodes:
            if isinstance(node, Loop | When):
                walk(node.body)
            elif isinstance(node, kind):
                found.append(node)

    walk(program.body)
    return found


@pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 3, 11), (2, 16, 5)])
def test_a_ragged_product_moves_each_element_as_often_as_it_must(sizes: tuple[int, int, int]) -> None:
    program = scheduled.read(matmul(sizes).mod["main"], {"m": M}, chip(2))
    found = simulate(program, chip(2))
    rows, columns = (-(-size // part) for size, part in ((M, sizes[0]), (N, sizes[1])))
    loaded = 2 * (M * K * columns + N * K * rows)
    assert [(t.level, t.read, t.written) for t in found.traffic] == [
        ("hbm", loaded, 4 * M * N),
        ("sram", 4 * M * N, loaded),
    ]
    assert found.flop == 2 * M * N * K


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("cores", [True, False])
@pytest.mark.parametrize("m", [1, 4, M])
def test_a_scheduled_product_is_equal_to_the_cycle(m: int, cores: bool, slots: int) -> None:
    spec = chip(3, fixed=3)
    program = scheduled.read(matmul((4, 4, 4), slots, cores=cores).mod["main"], {"m": m}, spec)
    assert simulate(program, spec).seconds == stepped.simulate(program, spec).seconds


def test_another_schedule_of_the_same_product_takes_another_time() -> None:
    spec, times = chip(1, fixed=30), {}
    for name, schedule in (
        ("small", matmul((4, 4, 4))),
        ("large", matmul((8, 8, 11))),
        ("single", matmul((4, 4, 4), 1)),
    ):
        times[name] = simulate(scheduled.read(schedule.mod["main"], {"m": 64}, spec), spec).seconds
    assert times["large"] < times["small"] < times["single"]


def test_operations_have_their_sizes_and_buffers() -> None:
    program = scheduled.read(matmul((4, 4, 4), 3).mod["main"], {"m": M}, chip())
    (product,), (move,) = operations(program, Matrix), operations(program, Vector)
    accumulators, x, w = product.reads
    assert product.writes == move.reads == (accumulators,)
    named = {b.name: b for b in program.buffers}
    assert [(named[n].level, named[n].slots) for n in (accumulators, x, w)] == [
        ("acc", 3),
        ("sram", 3),
        ("sram", 3),
    ]
    assert [named[n].slots for n in ("x", "w", "product")] == [0, 0, 0]
    load, other, store = operations(program, Copy)
    assert (load.source, load.target, load.bits) == ("x", x, 16)
    assert (other.source, other.target) == ("w", w)
    assert (store.source, store.target, store.bits) == (move.writes[0], "product", 32)


@pytest.mark.parametrize(("sizes", "run"), [((4, 4, 4), 4), ((4, 4, 11), 44), ((16, 4, 11), 9 * 11)])
def test_runs_are_as_long_as_rows_are_whole(sizes: tuple[int, int, int], run: int) -> None:
    """Elements that lie together: a part of a row, whole rows, or all there is."""
    program = scheduled.read(matmul(sizes, cores=False).mod["main"], {"m": M}, chip())
    events = stepped.simulate(program, chip()).events
    assert max(e.operation.run for e in events if getattr(e.operation, "source", "") == "x") == run


def test_work_without_a_unit_is_refused() -> None:
    schedule = matmul((4, 4, 4))
    schedule.unannotate(schedule.get_sblock("product_update"), "porter.matrix")
    with pytest.raises(TargetError, match="PORT-0445"):
        scheduled.read(schedule.mod["main"], {"m": 3}, chip())


def test_levels_and_dimensions_must_be_known() -> None:
    with pytest.raises(TargetError, match="PORT-0447"):
        scheduled.read(matmul((4, 4, 4)).mod["main"], {"n": 3}, chip())
    with pytest.raises(TargetError, match="PORT-0446"):
        scheduled.read(matmul((4, 4, 4)).mod["main"], {"m": 3}, target.load("tpu-v6e"))


def called(function: tirx.PrimFunc) -> IRModule:
    """A module whose `main` calls a kernel of x [batch * sequence, K]."""
    batch, sequence = (tirx.Var(name, "int64") for name in ("batch", "sequence"))
    x, w = (
        relax.Var(name, relax.TensorType(shape, "float16"))
        for name, shape in (("x", (batch * sequence, K)), ("w", (N, K)))
    )
    builder = relax.BlockBuilder()
    kernel = builder.add_func(function, "kernel")
    with builder.function("main", [x, w]):
        made = builder.emit(
            relax.op.builtin.alloc_tensor(relax.ShapeExpr([batch * sequence, N]), "float32", 0)
        )
        builder.emit(relax.Call(kernel, [x, w, made]))
        builder.emit_func_output(made)
    return builder.get()


def test_calls_bind_the_symbols_of_their_kernels() -> None:
    module = called(matmul((4, 4, 4)).mod["main"])
    found = scheduled.step(module, chip())
    assert found.calls == (Call("kernel", (("m", ("*", "batch", "sequence")),)),)
    time = found.simulate({"batch": 3, "sequence": 3}, chip())
    assert [kernel.flop for kernel, _ in time.calls] == [2 * M * N * K]
    assert scheduled.step(module, chip(), ["kernel"]).untimed == {"kernel": CONTROL}


def test_a_kernel_that_cannot_be_read_has_no_time_and_says_why() -> None:
    schedule = matmul((4, 4, 4))
    schedule.unannotate(schedule.get_sblock("product_update"), "porter.matrix")
    found = scheduled.step(called(schedule.mod["main"]), chip())
    assert found.untimed == {"kernel": "a block of a scheduled program does not say which unit does it"}


def product(spec: TargetSpec, m: int, n: int, k: int, weights: str = "bf16", **layout: int) -> tirx.PrimFunc:
    """A product that porter schedules."""
    kernel = Product(Layout(weights, n, k, lanes=1, **layout), Profile(spec).unit(weights)).kernel()
    found = tile.scheduled(kernel, "product", spec, {"m": m}, {"m": m})
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["maia-100", "maia-200", "tpu-v5e", "tpu-7x", "trainium1", "trainium2"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 80), (3, 160, 72), (33, 300, 130)])
def test_porters_products_are_equal_to_the_cycle(name: str, m: int, n: int, k: int) -> None:
    spec = target.load(name)
    program = scheduled.read(product(spec, m, n, k), {"m": m}, spec)
    expected, found = stepped.simulate(program, spec), simulate(program, spec)
    assert found.seconds == expected.seconds
    assert {t.level: [t.read, t.written] for t in found.traffic} == expected.moved
    outer = found.traffic[0]
    assert outer.read >= 4 * m * k + 2 * n * k, "every operand is read"
    assert outer.written == 4 * m * n, "every result is written, and no padding"
    assert found.flop >= 2 * m * n * k


def test_porters_vector_work_is_timed() -> None:
    spec = target.load("tpu-v6e")
    kernel = tile.scheduled(rms_norm(512, 1e-5), "rms_norm", spec, {"m": 8}, {"m": 8})
    assert kernel is not None
    program = scheduled.read(kernel, {"m": 8}, spec)
    found = simulate(program, spec)
    assert found.seconds == stepped.simulate(program, spec).seconds
    assert {u.unit for u in found.uses} == {"dma hbm", "vector"}
    assert np.isclose(found.traffic[0].written, 4 * 8 * 512)
