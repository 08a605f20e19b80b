"""How often the exact copy was read: by a session, by tokens that are no padding."""

from __future__ import annotations

import numpy as np

from porter.decoder import Decoder
from porter.run.decode import Decode
from porter.run.protocol import TensorSpec
from porter.run.tally import Tally


class Fake:
    """Two layers with two heads; a token's number says, by its bits, which of them reads the copy."""

    def __init__(self):
        self.inputs = {"tokens": TensorSpec(np.dtype(np.int64), ("batch", "sequence"))}
        self.outputs = {"logits": TensorSpec(np.dtype(np.float32), ("batch", "sequence", 16))}
        self.bounds = {}

    def run(self, feeds):
        tokens = feeds["tokens"]
        bits = (tokens[:, None] >> np.arange(4)[:, None]) & 1
        return {"logits": np.zeros((*tokens.shape, 16), np.float32),
                "attention_exact.0": bits[:, :2] > 0, "attention_exact.1": bits[:, 2:] > 0}  # fmt: skip


DECODER = Decoder("tokens", "logits", "concat", exact=("attention_exact.0", "attention_exact.1"))


def test_a_session_counts_every_head_of_every_token():
    decode = Decode(Fake(), DECODER, 2)
    decode.step(np.array([[0, 15, 1], [2, 8, 3]]))
    assert decode.tally == Tally(steps=24, exact=0 + 4 + 1 + 1 + 1 + 2)
    decode.step(np.array([[7], [0]]))
    assert decode.tally == Tally(steps=32, exact=12)
    assert decode.tally.share == 12 / 32


def test_padding_does_not_count():
    tally = Tally()
    decode = Decode(Fake(), DECODER, 2, tally)
    decode.step(np.array([[15, 15], [1, 15]]), np.array([[True, True], [True, False]]))
    assert tally == Tally(steps=12, exact=9)
    assert Tally().share == 0
