"""The plain run in bfloat16, bit for bit against ml_dtypes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from porter import graph, target
from porter.context import Context
from porter.decoder import recognise
from porter.drift.measures import score
from porter.drift.plain import round_to_bfloat16
from porter.pipeline import Pipeline
from porter.run.feeds import empty_caches
from porter.run.feeds import feeds as step_feeds
from porter.run.reference import ReferenceRunner

ROOT = Path(__file__).parents[3]

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
tiny (int64[b, s] tokens, int64[b, s] places, float[b, s, 4] past,
      float[6, 4] table, float[4, 4] w, float[4] gain, float two, float[4] rate, float low)
    => (float[b, s, 4] y, float[b, t, 4] present)
<int64[1] axis = {2}>
{
  x = Gather(table, tokens)
  f = Cast<to = 1>(places)
  f1 = Unsqueeze(f, axis)
  angle = Mul(f1, rate)
  c = Cos(angle)
  turned = Mul(x, c)
  h = MatMul(turned, w)
  doubled = Mul(h, two)
  normed = RMSNormalization(doubled, gain)
  masked = Max(normed, low)
  y = Add(masked, x)
  present = Concat<axis = 1>(past, y)
}"""


def tiny():
    model = ir.from_onnx_text(GRAPH)
    rng = np.random.default_rng(1)
    given = {"two": 2.0009766, "low": -3.4028235e38}
    for value in list(model.graph.inputs)[3:]:
        array = np.array(given.get(value.name, rng.normal(size=[int(n) for n in value.shape])), np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def rounded(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def feeds():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 6, (2, 3))
    return {"tokens": tokens, "places": np.arange(300, 306).reshape(2, 3),
            "past": rounded(rng.normal(size=(2, 3, 4)))}  # fmt: skip


def test_every_result_is_rounded_once_and_bit_for_bit(run_onnx):
    model = tiny()
    weights = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    fed = feeds()
    assert round_to_bfloat16(model) > 0
    got = run_onnx(model, fed)
    x = rounded(weights["table"])[fed["tokens"]]
    # Angles of positions beyond 256 are no numbers of bfloat16: rounded where they meet activations.
    angle = fed["places"].astype(np.float32)[..., None] * weights["rate"]
    turned = rounded(x * rounded(np.cos(angle)))
    h = rounded(turned.astype(np.float64) @ rounded(weights["w"]).astype(np.float64))
    doubled = rounded(h * weights["two"])  # a scalar keeps its float32
    wide = doubled.astype(np.float64)
    norm = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * rounded(weights["gain"])
    y = rounded(rounded(norm) + x)
    np.testing.assert_array_equal(got["y"], y)
    np.testing.assert_array_equal(got["present"], np.concatenate([fed["past"], y], axis=1))


def test_names_and_shapes_of_the_interface_stay():
    model = tiny()
    before = [(v.name, str(v.shape), v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]
    round_to_bfloat16(model)
    assert [(v.name, str(v.shape), v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == before


def test_what_no_token_reaches_is_left_alone():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    ints (int64[b] x) => (int64[b] y) { y = Add(x, x) }"""
    model = ir.from_onnx_text(text)
    assert round_to_bfloat16(model) == 0


def logits(model, tokens):
    about, runner = recognise(model), ReferenceRunner(model)
    caches = empty_caches(about, runner.inputs, len(tokens))
    return runner.run(step_feeds(about, tokens, 0, caches, runner.inputs))["logits"]


def test_a_trained_decoder_loses_what_pytorch_loses(stories_onnx):
    """PyTorch's own bfloat16 of the same model, which rounds at a few other places: softmax, halves of
    rotations."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(3, 512, (4, 48))
    module = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "samples" / "stories260k").eval()
    with torch.no_grad():
        theirs = module.to(torch.bfloat16)(torch.from_numpy(tokens)).logits.float().numpy()
    exact, plain = graph.load(stories_onnx), graph.load(stories_onnx)
    fusing = [p for p in Pipeline.parse(target.load("host").pipeline.format(weights="", kv="")).passes
              if p.name.split(".")[0] in ("clean", "fuse")]  # fmt: skip
    Pipeline(tuple(fusing)).run(plain, Context())
    round_to_bfloat16(plain)
    wanted = logits(exact, tokens)
    ours, reference = (score(wanted.reshape(-1, 512), x.reshape(-1, 512), tokens.reshape(-1))
                       for x in (logits(plain, tokens), theirs))  # fmt: skip
    for measure in ("kl", "noise"):
        a, b = (getattr(s, measure).mean() for s in (ours, reference))
        assert b / 2 < a < b * 2, measure  # 3 dB; one bit of mantissa more or less is 6
