"""The kernels of a step: their operations and bytes against counting by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from configs import PUBLISHED, llama

from porter import target
from porter.errors import SpecError
from porter.estimate import Model
from porter.estimate.config import read
from porter.estimate.work import Step, Stored, Work, kernels

H100 = target.load("h100")
PLAIN = Stored("bf16", "", 16, 1)


def model(tmp_path: Path, config: dict) -> Model:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    return read(path)


def only(found: list[Work], kernel: str) -> list[Work]:
    return [work for work in found if work.kernel == kernel]


@pytest.mark.parametrize("name", ["Llama-3-8B", "gpt2", "gemma-2-9b"])
def test_products_are_two_operations_a_weight_and_token(name: str, tmp_path: Path) -> None:
    big = model(tmp_path, PUBLISHED[name][0])
    found = only(kernels(big, H100, Step(3, 7, 0), PLAIN), "gemm")
    matrices = big.parameters - big.small - big.vocab * big.hidden * (1 if big.tied else 2)
    counted = sum(work.operations * work.count for work in found if work.name != "logits")
    assert counted == 2 * 21 * matrices
    (logits,) = (work for work in found if work.name == "logits")
    assert logits.operations == 2 * 3 * big.vocab * big.hidden, "of the last token of each row"


@pytest.mark.parametrize("window", [0, 1, 3, 5, 64])
@pytest.mark.parametrize(("tokens", "past"), [(5, 0), (1, 0), (1, 9), (11, 0)])
def test_attention_works_on_the_pairs_that_see_each_other(
    window: int, tokens: int, past: int, tmp_path: Path
) -> None:
    config = llama(24, 2, 6, 2, 32, 50, model_type="mistral", sliding_window=window or None, head_dim=5)
    found = kernels(model(tmp_path, config), H100, Step(2, tokens, past), PLAIN)
    (work,) = (w for w in found if w.kernel.endswith("attention"))
    pairs = sum(
        1
        for query in range(past, past + tokens)
        for key in range(past + tokens)
        if key <= query and (not window or query - key < window)
    )
    assert work.kernel == ("decode-attention" if tokens == 1 else "prefill-attention")
    assert work.count == 2
    assert work.operations == 2 * 6 * pairs * (2 * 5 + 2 * 5), (
        "rows, heads, pairs: a product with keys and values"
    )


def test_a_decode_step_reads_the_cache_as_it_is_stored(tmp_path: Path) -> None:
    config = model(tmp_path, llama(24, 2, 6, 2, 32, 50, head_dim=4))
    for bits in (16.0, 4.25):
        stored = replace(PLAIN, kv_bits=bits)
        (work,) = only(kernels(config, H100, Step(3, 1, 99), stored), "decode-attention")
        queries_and_results = 3 * 6 * (4 + 4) * 2
        assert work.bytes == 3 * 100 * 2 * (4 + 4) * bits / 8 + queries_and_results


def test_a_product_reads_codes_and_scales(tmp_path: Path) -> None:
    config = model(tmp_path, llama(64, 1, 4, 4, 128, 50))
    (down,) = (
        w
        for w in kernels(config, H100, Step(1, 1, 0), replace(PLAIN, weights="int4-g32"))
        if w.name == "down"
    )
    assert down.bytes == 128 * 2 + 64 * 128 / 2 + 64 * 128 / 32 * 4 + 64 * 2
    assert (down.format, down.shape) == ("bf16", (1, 64, 128)), "widened: H100 has no INT4"


@pytest.mark.parametrize(
    ("weights", "activations", "format_", "width"),
    [("fp8-e4m3fn", "", "bf16", 2), ("fp8-e4m3fn", "fp8-e4m3fn", "fp8-e4m3fn", 1), ("bf16", "", "bf16", 2)],
)
def test_activations_are_moved_in_the_format_of_the_product(
    weights: str, activations: str, format_: str, width: int, tmp_path: Path
) -> None:
    config = model(tmp_path, llama(64, 1, 4, 4, 128, 50))
    one, two = (
        next(
            w
            for w in kernels(config, H100, Step(1, rows, 0), Stored(weights, activations, 16, 1))
            if w.name == "down"
        )
        for rows in (1000, 3000)
    )
    assert one.format == format_
    # An FP8 matrix [rows, K] has a float32 scale for each row.
    scales = 4 if width == 1 else 0
    assert two.bytes - one.bytes == 2000 * (128 * width + scales + 64 * 2)


def test_experts_that_no_token_takes_are_not_read(tmp_path: Path) -> None:
    big = model(tmp_path, PUBLISHED["Mixtral-8x7B"][0])

    def up(rows: int) -> Work:
        return next(w for w in kernels(big, H100, Step(rows, 1, 0), PLAIN) if w.name == "gate and up")

    assert up(1).groups == 2, "two of eight"
    assert up(1).operations == 2 * 2 * 4096 * 28672
    assert up(2).groups == 8 * (1 - 0.75**2), "each of two tokens takes an expert with 1 in 4"
    assert 7.99 < up(64).groups <= 8


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
def test_chips_share_the_matrices_and_replicate_what_they_must(tp: int, tmp_path: Path) -> None:
    config = model(tmp_path, llama(512, 3, 16, 4, 1024, 1600))
    one, some = (kernels(config, H100, Step(2, 1, 31), replace(PLAIN, tp=n)) for n in (1, tp))
    work = {w.name: w for w in some}
    for whole in only(one, "gemm"):
        assert work[whole.name].operations * tp == whole.operations
    cached, queries = 2 * 32 * max(1, 4 // tp) * 64 * 2, 2 * 16 // tp * 64 * 2
    assert work["attention"].bytes == cached + queries
    assert work["norm and residual"].bytes == next(w for w in one if w.name == "norm and residual").bytes
    assert (work["sums over chips"].count, work["sums over chips"].bytes) == (6, 2 * 512 * 2)
    assert work["logits of all chips"].bytes == 2 * 1600 * 2
    assert not only(one, "all-reduce")


def test_weights_that_the_target_does_not_multiply_are_refused(tmp_path: Path) -> None:
    numerics = H100.numerics.model_copy(update={"widened": {}, "emulated": {}})
    bare = H100.model_copy(update={"numerics": numerics})
    with pytest.raises(SpecError) as error:
        kernels(
            model(tmp_path, llama(64, 1, 4, 4, 128, 50)), bare, Step(1, 1, 0), replace(PLAIN, weights="mx6")
        )
    assert error.value.code == "PORT-0338"
