"""What kernels hold of each memory, counted by hand, and what is refused."""

import re
from typing import Any

import pytest
from attentions import SPECS
from tiles import chip

from porter.errors import TargetError
from porter.lower.blocks import vector
from porter.lower.blocks.attention import attention
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.kernels.layout import Layout
from porter.lower.tile.capacity import held
from porter.lower.tile.chip import Chip
from porter.lower.tile.schedule import scheduled
from porter.target import TargetSpec


def changed(spec: TargetSpec, path: str, value: Any) -> TargetSpec:
    """The spec with another value of one figure."""
    first, _, rest = path.partition(".")
    old = spec[first] if isinstance(spec, dict) else getattr(spec, first)
    new = changed(old, rest, value) if rest else old.model_copy(update={"value": value})
    return {**spec, first: new} if isinstance(spec, dict) else spec.model_copy(update={first: new})


def test_bytes_of_a_product_are_those_counted_by_hand() -> None:
    """One row, k 64, n 64 in BF16 on maia-200: 64 columns dealt to its cores, two slots but of the sums."""
    spec = chip("maia-200")
    kernel = Product(Layout("int8", 64, 64, group=64, lanes=1), Profile(spec).unit("int8")).kernel()
    found = held(scheduled(kernel, "kernel", spec, {}, {"m": 1}), Chip(spec), {})
    by_name = {h.name: h for h in found}
    columns = by_name["w_operand_pad_global.tsram"].shape[0]
    sizes = {(h.name.split("_")[0], h.level): (h.slots, h.bytes) for h in found if "operand" not in h.name}
    k = by_name["x_operand_pad_global.tsram"].shape[-1]
    assert columns in (8, 16, 32, 64)
    assert k in (8, 16, 32, 64)
    assert sizes["x", "tsram"] == (2, 2 * max(64, k * 4))  # to the alignment
    assert sizes["w", "tsram"] == (2, 2 * max(64, k * columns))
    assert sizes["scale", "tsram"] == (2, 2 * max(64, 4 * columns))
    assert sizes["sum", "accumulators"][1] % (32 * 4) == 0
    assert by_name["x_operand_pad_global.tsram"].bytes == 2 * max(64, k * 2)
    assert by_name["w_operand_pad_global.tsram"].bytes == 2 * max(64, k * 2 * columns)


@pytest.mark.parametrize(
    ("name", "shape", "bits", "wanted"),
    [
        ("maia-200", (3, 5), 16, 64),  # 30 bytes, to 64
        ("tpu-v6e", (3, 5), 32, 4096),  # 8 x 128
        ("tpu-v6e", (3, 5), 8, 4096),  # 32 x 128
        ("tpu-v6e", (9, 129), 16, 16 * 256 * 2),
        ("tpu-v6e", (200,), 32, 4096),
        ("trainium2", (3, 5), 32, 2048),  # 16 bytes in each of 128 partitions
        ("trainium2", (128, 100, 1), 16, 128 * 208),
    ],
)
def test_bytes_of_a_buffer(name: str, shape: tuple[int, ...], bits: int, wanted: int) -> None:
    assert Chip(chip(name)).bytes(shape, bits) == wanted


def test_a_cache_too_long_for_its_scores_is_refused_by_name() -> None:
    spec = chip("maia-200")
    unit = Profile(spec).unit("fp32")
    kernel = attention(SPECS["head size 64"], unit, unit)
    with pytest.raises(
        TargetError, match=r"attn needs [\d,]+ bytes of tsram, which has 3,145,728: scores[\w.]+ takes"
    ) as e:
        scheduled(kernel, "attn", spec, {"b": 1, "s": 1, "t": 1 << 20})
    assert e.value.code == "PORT-0435"
    assert e.value.exit_code == 4
    tokens = re.search(r"x (\d+), 1 slot", str(e.value))
    assert tokens
    assert 1 << 20 <= int(tokens[1]) < 1.01 * (1 << 20)
    assert scheduled(kernel, "attn", spec, {"b": 1, "s": 1, "t": 1 << 16}) is not None


def test_a_row_too_long_to_reduce_is_refused() -> None:
    with pytest.raises(TargetError, match=r"PORT-0435: norm needs"):
        scheduled(vector.rms_norm(1 << 20, 1e-5), "norm", chip("maia-200"), {"m": 1})


def test_a_step_larger_than_a_bank_is_refused() -> None:
    spec = changed(chip("trainium2"), "limits.bank", 64)
    kernel = Product(Layout("fp32", 256, 128, lanes=1), Profile(spec).unit("bf16")).kernel()
    with pytest.raises(TargetError, match="PORT-0436: a unit step of p, 128 x 32 x 128, writes 128 bytes"):
        scheduled(kernel, "p", spec, {"m": 40})


def test_steps_that_do_not_begin_at_whole_blocks_are_refused_by_name() -> None:
    """TPU7x keeps 16 rows of BF16 in a block; 24 rows of a step begin in the middle of one."""
    spec = changed(chip("tpu-7x"), "matrix.formats.bf16.step", (24, 256, 256))
    kernel = Product(Layout("fp32", 256, 256, lanes=1), Profile(spec).unit("bf16")).kernel()
    what = r"PORT-0436: p takes 24 rows of x_operand[\w.]+ at a time, which has 48: steps begin at mult"
    with pytest.raises(TargetError, match=what) as e:
        scheduled(kernel, "p", spec, {}, {"m": 96})
    assert e.value.exit_code == 4
    assert scheduled(kernel, "p", spec, {}, {"m": 24}) is not None  # padded to 32, and one step


def test_a_chip_without_a_way_in_is_refused() -> None:
    spec = chip("maia-200").model_copy(update={"dma": {}})
    kernel = Product(Layout("fp32", 64, 64, lanes=1), Profile(spec).unit("fp32")).kernel()
    with pytest.raises(TargetError, match="PORT-0437: maia-200 has no DMA from hbm to tsram"):
        scheduled(kernel, "p", spec, {"m": 40})
