"""Trained models: perplexities as published with the texts, and drift of weights rounded to fewer bits."""

import json

import numpy as np
import pytest

from porter import tokenizer
from porter.drift.compare import compare, perplexity
from porter.drift.feeds import TokenFeeds, from_file, self_generated

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Torch:
    """A transformers model as a decoding session."""

    def __init__(self, model, batch):
        self.model, self.batch, self.cache, self.length = model, batch, transformers.DynamicCache(), 0

    @torch.no_grad()
    def step(self, tokens, real=None):
        assert tokens.shape[0] == self.batch
        at = torch.arange(self.length, self.length + tokens.shape[1])[None].expand(tokens.shape)
        out = self.model(
            torch.from_numpy(tokens), past_key_values=self.cache, position_ids=at, use_cache=True
        )
        self.length += tokens.shape[1]
        return out.logits.numpy()


def llama(folder, bits=None):
    """A session factory for a trained Llama; `bits` rounds each row of a linear to that many, symmetric."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(**json.loads((folder / "config.json").read_text()))
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    if bits:
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                scale = weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.data = (weight.data / scale).round() * scale
    return lambda batch: Torch(model, batch)


def texts(models, name):
    t = tokenizer.load(models / name)
    own = json.loads((models / "eval-text" / "self_generated_t0.8.json").read_text())[name]
    yield TokenFeeds(tuple(map(t.encode, own)), "text", "own")
    for file in ("handwritten.json", "tinystories_excerpt.json"):
        yield from_file(models / "eval-text" / file, t)


@pytest.mark.parametrize(
    ("name", "window", "published"),
    [
        ("stories260k", 512, [(2.5399, 2064), (4.3430, 754), (4.6867, 23494)]),
        ("babyllama-char-1m", 256, [(1.4877, 1530), (2.1817, 1547), (2.3307, 46271)]),
    ],
)
def test_perplexity_is_the_published_one(models, name, window, published):
    session = llama(models / name)
    for feeds, (ppl, tokens) in zip(texts(models, name), published, strict=True):
        got = perplexity(session, feeds, window=window, batch=8)
        assert got.tokens == tokens
        # Published to four decimals: 0.00005 of rounding, and float32 sums may tip it.
        assert got.ppl == pytest.approx(ppl, abs=6e-5)


@pytest.mark.long
def test_perplexity_of_a_byte_level_model(models):
    rows = np.load(models / "pycode-5m" / "val_tokens.npy").reshape(48, 512).astype(np.int64)
    got = perplexity(llama(models / "pycode-5m"), TokenFeeds(tuple(rows[:]), "tokens", "val_tokens"), batch=4)
    assert got.tokens == 24_528
    assert got.ppl == pytest.approx(45.460, abs=6e-4)  # published to three decimals


def test_fewer_bits_drift_further(models):
    folder = models / "stories260k"
    feeds = next(texts(models, "stories260k"))
    makers = {f"int{b}": llama(folder, b) for b in (8, 4, 3)}
    makers["same"] = llama(folder)
    got = compare(llama(folder), makers, feeds, window=512, batch=6)
    assert got["same"].total.kl_mean == 0
    kl = [got[f"int{b}"].total.kl_mean for b in (8, 4, 3)]
    # Noise power grows fourfold a bit, and KL with it: 256 and 4 times, give or take the tails.
    assert 64 < kl[1] / kl[0] < 1024
    assert 2 < kl[2] / kl[1] < 16
    for c in got.values():
        assert c.total.tokens == 2064
        assert c.short == 0
        assert c.decode.tokens == 6 * 64


def test_batches_and_steps_do_not_change_what_is_measured(models):
    """The same positions one by one through the cache, or all at once: the same drift but for rounding."""
    folder = models / "stories260k"
    feeds = next(texts(models, "stories260k"))
    reference, candidate = llama(folder), llama(folder, 4)
    a = compare(reference, {"x": candidate}, feeds, window=512, batch=1, decode_steps=64)["x"].total
    b = compare(reference, {"x": candidate}, feeds, window=512, batch=6, decode_steps=0)["x"].total
    # Logits move by about 1e-5 between the two ways; KL, near 0.1 nats with slope near 1, by as much.
    assert a.kl_mean == pytest.approx(b.kl_mean, rel=1e-4)
    assert a.top1 == pytest.approx(b.top1, abs=2 / 2064)


def test_the_model_writes_text_it_finds_likely(models):
    t = tokenizer.load(models / "stories260k")
    session = llama(models / "stories260k")
    feeds = self_generated(session, bos=t.bos, eos=[t.bos, *t.eos], length=200, count=8, seed=0)
    assert t.decode(feeds.sequences[0]).startswith("Once upon a time")
    # Published for six such texts: 2.54. Eight others of 200 tokens: within a fifth of it.
    assert perplexity(session, feeds, batch=8).ppl == pytest.approx(2.54, rel=0.2)
