"""ONNX Runtime as a Runner, and decoding step by step with it."""

import threading

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter import graph
from porter.decoder import Decoder, recognise
from porter.errors import ModelError, OptionError
from porter.run.decode import Decode, candidates, generate, greedy, sampler
from porter.run.protocol import Runner, TensorSpec
from porter.run.reference import ReferenceRunner

# Logits of the small decoders are sums of 8 products of values below about 30. Where steps differ from one
# full run only in the shapes of the matrices, float32 sums may associate differently: 8 * 2^-24 * 30 * 8 is
# 1e-4.
STEP = 1e-4

FORMS = {
    "concat": {},
    "positions": {"positions": "position_ids"},
    "mask": {"positions": "position_ids", "mask": "attention_mask"},
    "unnamed": {"tokens": "t", "past": ("c0", "c1"), "present": ("d0", "d1"), "output": "z"},
    "static": {"capacity": 12},
    "static positions": {"capacity": 12, "positions": "position_ids"},
}


def text(body: str, **initializers: np.ndarray) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]> {body}'))
    for value in [*model.graph.inputs]:
        if value.name in initializers:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(initializers[value.name], name=value.name)
            model.graph.initializers.add(value)
    return model


def attend(model: ir.Model, tokens: np.ndarray) -> np.ndarray:
    """The small decoder of conftest in float64, written from the definition of causal attention."""
    w = {n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items()}
    x = w["table"][tokens] + (w["places"][: tokens.shape[1]] if "places" in w else 0)
    batch, length, width = x.shape
    q = (x @ w["wq"]).reshape(batch, length, 2, 4)
    k, v = x @ w["wk"], x @ w["wv"]  # one head, which both query heads use
    scores = np.einsum("bshd,btd->bhst", q, k) / np.sqrt(4)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return (x + np.einsum("bhst,btd->bshd", p, v).reshape(batch, length, width)) @ w["head"]


# ------------------------------------------------------------------ the runner


def test_a_model_in_memory_and_its_file_give_the_same(tiny, tmp_path):
    model, tokens = tiny(past=None), {"input_ids": np.array([[1, 2, 3]])}
    graph.save(model, tmp_path / "m.onnx", threshold=64)
    runner: Runner = ReferenceRunner(tmp_path / "m.onnx")
    assert runner.inputs == {"input_ids": TensorSpec(np.dtype(np.int64), ("batch", "sequence"))}
    assert runner.outputs == {"logits": TensorSpec(np.dtype(np.float32), ("batch", "sequence", 11))}
    assert (runner.in_place, runner.engine) == ({}, "onnxruntime")
    ours = runner.run(tokens)["logits"]
    np.testing.assert_array_equal(ours, ReferenceRunner(model).run(tokens)["logits"])
    np.testing.assert_allclose(ours, attend(model, tokens["input_ids"]), atol=STEP, rtol=0)


def test_a_temporary_model_is_removed_and_still_runs(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = text(
        "g (float[n,600] x, float[600,600] w) => (float[n,600] y) { y = MatMul(x, w) }",
        w=np.eye(600, dtype=np.float32),
    )
    runner = ReferenceRunner(model)
    assert not list(tmp_path.iterdir())
    x = np.random.default_rng(0).standard_normal((2, 600)).astype(np.float32)
    np.testing.assert_array_equal(runner.run({"x": x})["y"], x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"past_key_values.0.key": None}, "past_key_values.0.key"),
        ({"surplus": np.zeros(1)}, "surplus"),
        ({"input_ids": np.zeros((2, 3), np.int32)}, "int64"),
        ({"input_ids": np.zeros(3, np.int64)}, "[batch, sequence]"),
        ({"past_key_values.0.key": np.zeros((2, 2, 0, 4), np.float32)}, "[batch, 1, past, 4]"),
        ({"past_key_values.0.key": np.zeros((3, 1, 0, 4), np.float32)}, "'batch' is 3"),
        ({"past_key_values.0.value": np.zeros((2, 1, 5, 4), np.float32)}, "'past' is 5"),
    ],
)
def test_wrong_feeds_are_named(tiny, change, said):
    empty = np.zeros((2, 1, 0, 4), np.float32)
    right = {
        "input_ids": np.zeros((2, 3), np.int64),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }
    runner = ReferenceRunner(tiny())
    runner.run(right)
    with pytest.raises(OptionError, match="PORT-0141") as caught:
        runner.run({n: a for n, a in (right | change).items() if a is not None})
    assert said in str(caught.value)


def test_an_operator_that_onnx_runtime_lacks_runs_in_the_onnx_reference():
    runner = ReferenceRunner(text("g (double[n,4] x) => (double[n,4] y) { y = Elu(x) }"))
    assert runner.engine == "onnx.reference"
    assert runner.inputs == {"x": TensorSpec(np.dtype(np.float64), ("n", 4))}
    x = np.linspace(-3, 3, 12).reshape(3, 4)
    found = runner.run({"x": x})["y"]
    np.testing.assert_allclose(
        found, np.where(x > 0, x, np.expm1(x)), rtol=2e-15
    )  # roundings of exp(x) and 1 over 0.24
    with pytest.raises(OptionError, match="PORT-0141"):
        runner.run({"x": x[0]})


def test_a_model_that_does_not_run_is_explained():
    unknown = text("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    unknown.graph.opset_imports["made.up"] = 1
    next(iter(unknown.graph)).domain = "made.up"
    with pytest.raises(ModelError, match="PORT-0143"):
        ReferenceRunner(unknown)
    runner = ReferenceRunner(text("g (float[n] x, float[m] z) => (float[k] y) { y = Add(x, z) }"))
    with pytest.raises(OptionError, match="PORT-0145"):
        runner.run({"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})


def test_a_broken_file_is_refused_before_onnx_runtime_sees_it(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"broken")
    with pytest.raises(ModelError, match="PORT-0104"):
        ReferenceRunner(tmp_path / "m.onnx")


def test_int8_weights_do_not_round_the_activations():
    """Each output sums 64 products, each rounded by 2^-24 of its size at most: 64 * 2^-24 = 4e-6.

    With ONNX Runtime's further optimizations, activations become int8 and the error is near 1e-2.
    """
    random = np.random.default_rng(0)
    q, s = random.integers(-127, 128, (32, 64)).astype(np.int8), random.random(32).astype(np.float32)
    body = """g (float[n,64] x, int8[32,64] q, float[32] s) => (float[n,32] y) {
        d = DequantizeLinear<axis = 0>(q, s)
        t = Transpose<perm = [1, 0]>(d)
        y = MatMul(x, t)
    }"""
    x = random.standard_normal((3, 64)).astype(np.float32)
    weights = q * s[:, None].astype(np.float64)
    found = ReferenceRunner(text(body, q=q, s=s)).run({"x": x})["y"]
    bound = 4e-6 * (np.abs(x.astype(np.float64)) @ np.abs(weights.T))
    assert (np.abs(found - x @ weights.T) <= bound).all()


def test_threads_come_from_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    one = ReferenceRunner(tiny(past=None)).run({"input_ids": np.array([[1, 2, 3]])})["logits"]
    monkeypatch.setenv("PORTER_THREADS", "2")
    runner = ReferenceRunner(tiny(past=None))
    assert runner._session.get_session_options().intra_op_num_threads == 2
    np.testing.assert_array_equal(runner.run({"input_ids": np.array([[1, 2, 3]])})["logits"], one)
    monkeypatch.setenv("PORTER_THREADS", "many")
    with pytest.raises(OptionError, match="PORT-0147"):
        ReferenceRunner(tiny(past=None))


def test_a_runner_may_be_shared_by_threads(tiny):
    runner, tokens = ReferenceRunner(tiny(past=None)), np.arange(8)[None]
    expected, found = runner.run({"input_ids": tokens})["logits"], []
    threads = [
        threading.Thread(target=lambda: found.append(runner.run({"input_ids": tokens})["logits"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, expected)


# ------------------------------------------------------------------ decoding


def session(model: ir.Model, batch: int = 1) -> Decode:
    return Decode(ReferenceRunner(model), recognise(model), batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("splits", [[12], [1] * 12, [5, 1, 6], [11, 1]])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_equal_one_full_run(tiny, form, splits, batch):
    model = tiny(**FORMS[form])
    decode = session(model, batch)
    tokens = np.random.default_rng(1).integers(0, 11, (batch, 12))
    parts = [decode.step(part) for part in np.split(tokens, np.cumsum(splits)[:-1], axis=1)]
    assert decode.length == 12
    assert {p.dtype for p in parts} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.concatenate(parts, 1), attend(model, tokens), atol=STEP, rtol=0)
    decode.reset()
    assert decode.length == 0
    np.testing.assert_array_equal(decode.step(tokens[:, : splits[0]]), parts[0])


@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_any_split_decodes_alike(tiny, splits, seed):
    model = tiny(positions="position_ids", seed=seed)
    tokens = np.random.default_rng(seed).integers(0, 11, (2, min(sum(splits), 16)))
    decode = session(model, 2)
    parts = [decode.step(p) for p in np.split(tokens, np.cumsum(splits)[:-1], axis=1) if p.size]
    np.testing.assert_allclose(np.concatenate(parts, 1), attend(model, tokens), atol=STEP, rtol=0)


def test_an_encoder_remembers_nothing():
    model = text(
        """g (int64[b,s] input_ids, int64[b,s] attention_mask, int64[b,s] token_type_ids,
              float[9,4] table, float[2,4] kinds) => (float[b,s,4] last_hidden_state) {
            words = Gather(table, input_ids)
            types = Gather(kinds, token_type_ids)
            sum = Add(words, types)
            mask = Cast<to = 1>(attention_mask)
            axis = Constant<value_ints = [2]>()
            column = Unsqueeze(mask, axis)
            last_hidden_state = Mul(sum, column)
        }""",
        table=np.arange(36, dtype=np.float32).reshape(9, 4),
        kinds=np.array([[0.5] * 4, [9.0] * 4], np.float32),
    )
    decode = session(model, 2)
    for _ in range(2):
        found = decode.step(np.array([[8, 0, 1], [2, 2, 2]]))
        np.testing.assert_array_equal(found, np.arange(36).reshape(9, 4)[[[8, 0, 1], [2, 2, 2]]] + 0.5)
        assert decode.length == 0


def test_a_full_cache_and_a_full_context_are_refused(tiny):
    decode = session(tiny(capacity=4))
    decode.step(np.array([[1, 2, 3]]))
    with pytest.raises(OptionError, match=r"PORT-0142: 5 tokens.*cache of 4"):
        decode.step(np.array([[1, 2]]))
    decode.step(np.array([[1]]))  # the last place is still free
    model = tiny()
    model.metadata_props["porter.context_length"] = "3"
    with pytest.raises(OptionError, match=r"PORT-0142.*context of 3"):
        session(model).step(np.array([[1, 2, 3, 4]]))


@pytest.mark.parametrize("tokens", [[1, 2], [[1], [2]], [[]], [[1.5]], [[11]], [[-1]]])
def test_wrong_tokens_are_refused(tiny, tokens):
    decode = session(tiny())
    with pytest.raises(OptionError, match="PORT-0141"):
        decode.step(np.array(tokens))
    assert decode.length == 0


def test_inputs_without_a_meaning_are_refused(tiny):
    runner = ReferenceRunner(tiny())
    with pytest.raises(ModelError, match=r"PORT-0144.*pixels"):
        Decode(runner, Decoder("input_ids", "logits", "none", others=("pixels",)), 1)


# ------------------------------------------------------------------ generating


def test_greedy_text_is_the_one_of_full_runs(tiny):
    model = tiny()
    expected = [3, 1]
    for _ in range(8):
        expected.append(int(attend(model, np.array([expected]))[0, -1].argmax()))
    assert list(generate(session(model), [3, 1], 8)) == expected[2:]


def test_generation_ends_before_eos(tiny):
    model = tiny()
    whole = list(generate(session(model), [3, 1], 8))
    assert list(generate(session(model), [3, 1], 8, eos=[whole[3]])) == whole[: whole.index(whole[3])]
    model.metadata_props["porter.eos"] = str(whole[3])
    assert list(generate(session(model), [3, 1], 8)) == whole[: whole.index(whole[3])]
    assert list(generate(session(model), [3, 1], 8, eos=[])) == whole


def test_generation_is_lazy_and_may_fill_the_cache_exactly(tiny):
    decode = session(tiny(capacity=6))
    stream = generate(decode, [3, 1, 2], 9)
    next(stream)
    assert decode.length == 3
    made = [next(stream) for _ in range(3)]  # the last one needs no room
    assert (len(made), decode.length) == (3, 6)
    with pytest.raises(OptionError, match="PORT-0142"):
        next(stream)


def test_a_seed_repeats_and_temperature_zero_is_greedy(tiny):
    def made(**options: float) -> list[int]:
        return list(generate(session(tiny()), [3], 12, sampler(**options)))

    assert made(temperature=2.0, seed=1) == made(temperature=2.0, seed=1)
    assert made(temperature=5.0, seed=1) != made(temperature=5.0, seed=2)
    assert made(temperature=0) == made(temperature=3.0, top_k=1) == list(generate(session(tiny()), [3], 12))


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9),
    temperature=st.floats(0.1, 10),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1),
)
def test_candidates_are_what_the_options_say(logits, temperature, top_k, top_p):
    logits = np.array(logits, np.float32)
    order, p = candidates(logits, temperature, top_k, top_p)
    full = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = np.sort(full)[::-1][: top_k or None]
    kept /= kept.sum()
    fewest = next((n for n in range(1, len(kept) + 1) if kept[:n].sum() >= top_p), len(kept))
    assert abs(len(order) - fewest) <= (abs(np.cumsum(kept) - top_p).min() < 1e-12)  # sums may tie with top_p
    assert (np.diff(logits[order]) <= 0).all()
    assert abs(p.sum() - 1) < 1e-12  # a few additions of float64
    np.testing.assert_allclose(
        p / p[0], full[order] / full[order[0]], rtol=1e-9
    )  # exp amplifies 50 / 0.1 roundings
    assert order[0] == greedy(logits)


def test_draws_follow_the_probabilities():
    """10,000 draws of p = 0.75: the count's deviation is 43, and 5 deviations are 217."""
    draw = sampler(seed=3)
    logits = np.log(np.array([0.75, 0.25], np.float32))
    assert abs(sum(draw(logits) == 0 for _ in range(10_000)) - 7500) < 217


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}],
)
def test_senseless_sampling_is_refused(options):
    with pytest.raises(OptionError, match="PORT-0146"):
        sampler(**options)
