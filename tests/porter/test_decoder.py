"""What inputs and outputs mean, and what a step is fed."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from porter.decoder import CacheTensor, Decoder, recognise
from porter.errors import ModelError, OptionError
from porter.run.feeds import aligned_zeros, empty_caches, feeds
from porter.run.protocol import TensorSpec

CACHE = {
    "past": ("past_key_values.0.key", "past_key_values.0.value"),
    "present": ("present.0.key", "present.0.value"),
}


def interface(
    inputs: str, outputs: str = "float[b,s,9] logits", body: str = "", metadata: str = ""
) -> ir.Model:
    """A model of inputs and outputs that are not connected, except for what `body` says."""
    made = [part.split()[-1] for part in outputs.split("; ")]
    left = [n for n in made if n.strip('"') + " = " not in body]
    fill = "\n".join(f"{n} = Constant<value = float {{0}}>()" for n in left)
    head = f'<ir_version: 11, opset_import: ["" : 24]{metadata}>'
    inputs, outputs = (part.replace("; ", ", ") for part in (inputs, outputs))
    text = f"{head} g ({inputs}) => ({outputs}) {{ {body}\n{fill} }}"
    return ir.from_proto(onnx.parser.parse_model(text))


def past(name: str, size: str = "b,2,p,4") -> str:
    return f'float[{size}] "{name}"'


def test_our_own_export(tiny):
    assert recognise(tiny()) == Decoder(
        tokens="input_ids",
        output="logits",
        cache="concat",
        caches=(
            CacheTensor("past_key_values.0.key", "present.0.key", 0, "key"),
            CacheTensor("past_key_values.0.value", "present.0.value", 0, "value"),
        ),
    )


def test_positions_and_a_mask_as_inputs(tiny):
    found = recognise(tiny(positions="position_ids", mask="attention_mask"))
    assert (found.positions, found.mask, found.others) == ("position_ids", "attention_mask", ())


@pytest.mark.parametrize(
    ("pasts", "presents"),
    [
        (("past_key_0", "past_value_0"), ("present_key_0", "present_value_0")),
        (("past.0.key", "past.0.value"), ("present.0.key", "present.0.value")),
        (("past_key_values_0_key", "past_key_values_0_value"), ("present_0_key", "present_0_value")),
        (
            ("past_key_values.0.k", "past_key_values.0.v"),
            ("present_key_values.0.k", "present_key_values.0.v"),
        ),
    ],
)
def test_names_of_other_exporters(tiny, pasts, presents):
    found = recognise(tiny(past=pasts, present=presents))
    assert [(c.past, c.present, c.layer, c.kind) for c in found.caches] == [
        (pasts[0], presents[0], 0, "key"),
        (pasts[1], presents[1], 0, "value"),
    ]
    assert found.cache == "concat"


def test_layers_are_paired_by_number_not_by_order():
    pasts = [f"past_key_values.{i}.{kind}" for i in (0, 2, 10) for kind in ("key", "value")]
    presents = [n.replace("past_key_values", "present") for n in pasts]
    outputs = "; ".join(["float[b,s,9] logits", *(past(n, "b,2,t,4") for n in sorted(presents))])
    found = recognise(interface("; ".join(["int64[b,s] input_ids", *map(past, pasts)]), outputs))
    assert [(c.past, c.present) for c in found.caches] == list(zip(pasts, presents, strict=True))
    assert [c.layer for c in found.caches] == [0, 0, 2, 2, 10, 10]


def test_structure_where_names_say_nothing(tiny):
    found = recognise(
        tiny(tokens="t", past=("c0", "c1"), present=("d0", "d1"), output="z", positions="position_ids")
    )
    assert (found.tokens, found.output, found.positions) == ("t", "z", "position_ids")
    assert found.caches == (CacheTensor("c0", "d0", 0, "key"), CacheTensor("c1", "d1", 0, "value"))


def test_links_in_the_graph_beat_the_order():
    body = "d1 = Concat<axis = 2>(c1, n) d0 = Concat<axis = 2>(c0, n) logits = Gather(n, t)"
    inputs = "; ".join(["int64[b,s] t", past("c0"), past("c1"), "float[b,2,s,4] n"])
    outputs = "; ".join(["float[b,s,9] logits", past("d1"), past("d0")])
    found = recognise(interface(inputs, outputs, body))
    assert [(c.past, c.present, c.kind) for c in found.caches] == [("c0", "d0", "key"), ("c1", "d1", "value")]
    assert found.others == ("n",)


def test_order_where_no_link_shows():
    body = "a = Relu(c0) b = Relu(c1) d0 = Add(a, a) d1 = Add(b, b) logits = Gather(c0, t)"
    inputs = "; ".join(["int64[b,s] t", past("c0"), past("c1")])
    found = recognise(interface(inputs, "; ".join(["float[b,s,9] logits", past("d0"), past("d1")]), body))
    assert [(c.past, c.present, c.kind) for c in found.caches] == [("c0", "d0", "key"), ("c1", "d1", "value")]


def test_the_largest_table_is_the_tokens():
    body = "w = Cast<to = 7>(words) e = Gather(table, w) p = Gather(few, places) logits = Add(e, p)"
    model = interface(
        "int32[b,s] words; int64[b,s] places; float[900,4] table; float[16,4] few",
        "float[b,s,4] logits",
        body,
    )
    assert recognise(model).tokens == "words"
    flat = "w = Reshape(words, f) e = Gather(table, w) p = Gather(few, places) logits = Add(e, p)"
    inputs = "int64[b,s] words; int64[b,s] places; int64[2] f; float[900,4] table; float[16,4] few"
    assert recognise(interface(inputs, "float[b,s,4] logits", flat)).tokens == "words"


def test_the_static_form_and_its_quantized_variant(tiny):
    found = recognise(tiny(capacity=12))
    assert (found.cache, found.capacity, found.lengths) == ("static", 12, "past_lengths")
    found = recognise(tiny(capacity=12, lengths="n"))  # TensorScatter tells
    assert (found.cache, found.capacity, found.lengths) == ("static", 12, "n")
    names = [f"0.{kind}{scale}" for kind in ("key", "value") for scale in ("", "_scale")]
    inputs = [
        f'{"float" if "scale" in n else "int8"}[b,2,32,{1 if "scale" in n else 4}] "past_key_values.{n}"'
        for n in names
    ]
    outputs = [i.replace("past_key_values", "present") for i in inputs]
    found = recognise(
        interface(
            "; ".join(["int64[b,s] input_ids", *inputs, "int64[b] past_lengths"]),
            "; ".join(["float[b,s,9] logits", *outputs]),
        )
    )
    assert [c.kind for c in found.caches] == ["key", "key_scale", "value", "value_scale"]
    assert (found.cache, found.capacity, found.others) == ("static", 32, ())


def test_an_encoder():
    found = recognise(
        interface(
            "int64[b,s] input_ids; int64[b,s] attention_mask; int64[b,s] token_type_ids",
            "float[b,s,8] last_hidden_state; float[b,8] pooler_output",
        )
    )
    assert found == Decoder(
        tokens="input_ids",
        output="last_hidden_state",
        cache="none",
        mask="attention_mask",
        token_types="token_type_ids",
    )


def test_inputs_without_a_meaning_are_kept_apart():
    found = recognise(interface("int64[b,s] input_ids; float[b,3,8,8] pixels; float[b,1,s,t] attention_mask"))
    assert found.others == ("pixels", "attention_mask")  # a mask of four axes is not one of ones
    assert found.caches == ()


def test_metadata():
    found = recognise(
        interface(
            "int64[b,s] input_ids",
            metadata=', metadata_props: ["porter.context_length": "512", "porter.eos": "[2, 7]"]',
        )
    )
    assert (found.context, found.eos) == (512, (2, 7))


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ("float[b,3,8,8] pixels", "float[b,9] classes", "pixels float[b,3,8,8]"),
        ("int64[b,s] unused", "float[b,s,9] logits", "unused int64[b,s]"),
        ("int64[b,s] input_ids", "float[b,9] classes", "classes float[b,9]"),
    ],
)
def test_what_is_no_decoder_is_said_with_its_interface(inputs, outputs, said):
    with pytest.raises(ModelError, match="PORT-0131") as caught:
        recognise(interface(inputs, outputs))
    assert said in caught.value.hint


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([past("past.0.key"), past("past.0.value")], [past("present.0.key")]),
        ([past("past.0.key")], [past("present.1.key")]),
        ([past("a"), past("b")], [past("c")]),
        ([past("a")], [past("c")]),
        ([past("a"), past("b")], [past("c"), past("d", "b,3,p,4")]),
        ([past("past.0.key", "b,2,16,4")], [past("present.0.key", "b,2,17,4")]),
        ([past("past.0.key"), "int64[b] past_lengths"], [past("present.0.key")]),
        (
            [past("past.0.key", "b,2,8,4"), past("past.0.value", "b,2,9,4"), "int64[b] past_lengths"],
            [past("present.0.key"), past("present.0.value")],
        ),
    ],
)
def test_caches_that_cannot_be_stepped_are_refused(inputs, outputs):
    with pytest.raises(ModelError, match="PORT-0132"):
        recognise(
            interface(
                "; ".join(["int64[b,s] input_ids", *inputs]), "; ".join(["float[b,s,9] logits", *outputs])
            )
        )


# ------------------------------------------------------------------ feeds


FULL = Decoder(tokens="t", output="y", cache="concat", positions="p", mask="m", lengths="n", token_types="k")


def test_a_step_is_fed_what_it_wants():
    found = feeds(FULL, np.array([[5, 6], [7, 8], [1, 2]], np.int32), 3, {"c": np.zeros(1)})
    assert list(found) == ["t", "p", "m", "n", "k", "c"]
    np.testing.assert_array_equal(found["p"], [[3, 4]] * 3)
    np.testing.assert_array_equal(found["m"], np.ones((3, 5)))
    np.testing.assert_array_equal(found["n"], [3, 3, 3])
    np.testing.assert_array_equal(found["k"], np.zeros((3, 2)))
    assert {found[n].dtype for n in "tpmnk"} == {np.dtype(np.int64)}
    assert all(found[n].flags.c_contiguous and found[n].flags.writeable for n in "tpmnk")


def test_rows_may_have_their_own_past():
    found = feeds(FULL, np.array([[5], [7]]), np.array([0, 2]), {})
    np.testing.assert_array_equal(found["p"], [[0], [2]])
    np.testing.assert_array_equal(found["m"], [[0, 0, 1], [1, 1, 1]])
    np.testing.assert_array_equal(found["n"], [0, 2])


def test_feeds_take_the_types_that_the_model_wants():
    specs = {
        "t": TensorSpec(np.dtype(np.int32), ("b", "s")),
        "p": TensorSpec(np.dtype(np.int64), ("s",)),
        "m": TensorSpec(np.dtype(bool), ("b", "t")),
    }
    found = feeds(FULL, np.array([[5, 6]]), 1, {}, specs)
    assert (found["t"].dtype, found["m"].dtype) == (np.int32, bool)
    np.testing.assert_array_equal(found["p"], [1, 2])


def test_empty_caches(tiny):
    specs = {n: TensorSpec(np.dtype(np.float32), ("batch", 1, "past", 4)) for n in CACHE["past"]}
    found = empty_caches(recognise(tiny()), specs, 3)
    assert {n: a.shape for n, a in found.items()} == dict.fromkeys(CACHE["past"], (3, 1, 0, 4))
    specs = {n: TensorSpec(np.dtype(np.int8), ("batch", 1, 12, 4)) for n in CACHE["past"]}
    found = empty_caches(recognise(tiny(capacity=12)), specs, 3)
    assert all(
        a.shape == (3, 1, 12, 4) and a.dtype == np.int8 and not a.any() and a.flags.writeable
        for a in found.values()
    )


@pytest.mark.parametrize(
    ("shape", "error"),
    [((2, 1, "p", 4), OptionError), (("b", "h", "p", 4), ModelError), (("b", 1, "p", ""), ModelError)],
)
def test_caches_of_an_unknown_size_are_refused(tiny, shape, error):
    specs = {n: TensorSpec(np.dtype(np.float32), shape) for n in CACHE["past"]}
    with pytest.raises(error):
        empty_caches(recognise(tiny()), specs, 3)


def test_buffers_are_aligned():
    for count in range(1, 70):  # any size, since the allocator's own alignment depends on it
        made = aligned_zeros((count, 3), np.dtype(np.float32))
        assert made.ctypes.data % 64 == 0
        assert made.shape == (count, 3)
