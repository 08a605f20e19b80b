"""Cache: the definition of every scheme as a program on numpy arrays, one layer, slow and plain.

Its `state` is the planned buffers (`porter.kv.layout`), so that other forms of a scheme can be compared with
it byte for byte. In order, a token t of a row

1. is divided by the normalizer (keys) and turned by the rotation, and rounded to float32;
2. where a side has a window, is rounded to high precision and put in its slot: t for a sink, else
   sink + (t - sink) mod ring;
3. becomes codes, once its group is complete and no token of it is among the `recent` newest; sinks never do.
   Groups along tokens begin after the sinks. A side without a window makes codes of (1) at once.

Codes are made once, of what the window holds, so the state after any number of tokens does not depend on how
they were split into appends, nor on what came after a slot or a group was full.
"""

from __future__ import annotations

import numpy as np

from porter.formats.wide import WIDE
from porter.kv import rounding
from porter.kv.constants import Constants, matrix
from porter.kv.layout import buffers, pools
from porter.kv.rotation import turn
from porter.kv.scheme import Scheme

SIDES = ("key", "value")


class Cache:
    """`heads` KV heads of `head_size` channels, `batch` rows of up to `capacity` tokens, empty at first.

    `state`: the buffers by name, zeros at first. `lengths`: int64 [B], the tokens of each row. The scheme is
    that of one layer (`Scheme.layer`). Raises PassError PORT-0272 when a constant is missing.
    """

    def __init__(
        self,
        scheme: Scheme,
        head_size: int,
        heads: int,
        capacity: int,
        batch: int = 1,
        constants: Constants | None = None,
    ) -> None:
        self.scheme, self.head_size, self.capacity = scheme, head_size, capacity
        self.constants = constants or Constants()
        self.constants.check(scheme)
        planned = buffers(scheme, head_size, heads, capacity, batch)
        self.state = {b.name: np.zeros(b.shape, b.dtype) for b in planned}
        self.lengths = np.zeros(batch, np.int64)
        self.heads = heads
        firsts = {"key": self.constants.key_first, "value": self.constants.value_first}
        self._matrices = {
            name: matrix(scheme.side(name), head_size, firsts[name]) if scheme.side(name).rotate else None
            for name in SIDES
        }
        self._steps = {"key": self.constants.key_step, "value": self.constants.value_step}

    def append(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        counts: np.ndarray | None = None,
        tags: np.ndarray | None = None,
    ) -> None:
        """Add finite float32 [B,H,S,D]; `counts` int [B]: how many of the S are of each row, None: all.
        `tags` int [B,S], for a tagged scheme. Raises ValueError when a row would be full."""
        batch, _, tokens, _ = keys.shape
        counts = np.full(batch, tokens) if counts is None else counts
        if (self.lengths + counts > self.capacity).any():
            raise ValueError(f"a row would have more than {self.capacity} tokens")
        new = {"key": self._turned("key", keys), "value": self._turned("value", values)}
        for row, count in enumerate(counts):
            if self.scheme.tagged:
                self._assign(row, tags[row, :count])
            for name in SIDES:
                self._append(name, row, new[name][row, :, :count])
            self.lengths[row] += count

    def _turned(self, name: str, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        if name == "key" and self.scheme.normalize:
            x = x / self.constants.normalizer[:, None]
        return x if self._matrices[name] is None else turn(x, self._matrices[name]).astype(np.float32)

    def _append(self, name: str, row: int, new: np.ndarray) -> None:
        """One side of one row, float32 [H,S,D]."""
        scheme, side = self.scheme, self.scheme.side(name)
        start = int(self.lengths[row])
        end = start + new.shape[1]
        if not side.coded:
            self.state[name][row, :, start:end] = WIDE[side.element].encode(new)
            return
        if scheme.copy:
            copied = WIDE[scheme.copy].encode(new)
            self.state[f"{name}_copy"][row, :, start:end] = copied
            new = copied.astype(np.float32)
        if scheme.windowed(side):
            new = WIDE[scheme.high].encode(new).astype(np.float32)
        done, ready = scheme.rounded(side, start), scheme.rounded(side, end)
        first = min(start, scheme.sink + done)
        tokens = np.concatenate([self._window(name, row, first, start), new], axis=1)
        if ready > done:
            at = scheme.sink + done - first
            self._write(name, row, done, tokens[:, at : at + ready - done])
        self._keep(name, row, start, new)

    def _slots(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """The window's slots of tokens."""
        sink, ring = self.scheme.sink, self.scheme.ring(self.scheme.side(name))
        return np.where(tokens < sink, tokens, sink + (tokens - sink) % max(ring, 1))

    def _window(self, name: str, row: int, start: int, end: int) -> np.ndarray:
        """Tokens start to end - 1, which are in the window, float32 [H,T,D]."""
        if start == end:
            return np.zeros((self.heads, 0, self.head_size), np.float32)
        slots = self._slots(name, np.arange(start, end))
        return self.state[f"{name}_window"][row][:, slots].astype(np.float32)

    def _keep(self, name: str, row: int, start: int, new: np.ndarray) -> None:
        """Put the sinks and the newest tokens in the window; a slot holds the last token that it is for."""
        sink, ring = self.scheme.sink, self.scheme.ring(self.scheme.side(name))
        tokens = np.arange(start, start + new.shape[1])
        kept = (tokens < sink) | (tokens >= max(sink, start + new.shape[1] - ring))
        if kept.any():
            slots = self._slots(name, tokens[kept])
            self.state[f"{name}_window"][row][:, slots] = new[:, kept]

    def _write(self, name: str, row: int, start: int, tokens: np.ndarray) -> None:
        """Round tokens [H,T,D] to codes, the first of them as the token `start` after the sinks."""
        side = self.scheme.side(name)
        for suffix, element, mine, slots in self._places(name, row, start, start + tokens.shape[1]):
            parts = rounding.encode(side, element, tokens[:, mine], self._steps[name])
            for part, array in parts.items():
                buffer = self.state[f"{name}{suffix}_{part}"][row]
                grouped = side.along == "tokens" and part in ("scale", "min")
                buffer[:, slots[:: side.flush] // side.flush if grouped else slots] = array

    def _places(
        self, name: str, row: int, start: int, end: int
    ) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        """Where tokens start to end - 1 after the sinks are: (suffix, element, which of them, slots)."""
        side, each = self.scheme.side(name), np.arange(start, end)
        if not self.scheme.tagged:
            found = [("", side.element, each >= 0, each)]
        else:
            slots = self.state["slots"][row, 0, start:end, 0]
            found = [
                ("", side.element, slots >= 0, slots[slots >= 0]),
                ("_more", side.more, slots < 0, ~slots[slots < 0]),
            ]
        return [place for place in found if place[2].any()]

    def _assign(self, row: int, tags: np.ndarray) -> None:
        """Give each new token after the sinks its slot: of those with more bits when its tag wants them and
        one is free, or when no other is; of the others else. Slots are handed out in the tokens' order. What
        is no tag wants no more bits."""
        start, (usual, more) = int(self.lengths[row]), pools(self.scheme, self.capacity)
        for token in range(max(start, self.scheme.sink), start + len(tags)):
            slots, place = self.state["slots"][row, 0, :, 0], token - self.scheme.sink
            high = int((slots[:place] < 0).sum())
            low, tag = place - high, int(tags[token - start])
            wants = 0 <= tag < len(self.constants.more) and bool(self.constants.more[tag])
            up = high < more and (wants or low >= usual)
            slots[place] = ~high if up else low

    def stored(self, name: str, row: int) -> np.ndarray:
        """All tokens of a row as they are held, turned and normalized, float32 [H,length,D]."""
        scheme, side, length = self.scheme, self.scheme.side(name), int(self.lengths[row])
        if not side.coded:
            return self.state[name][row, :, :length].astype(np.float32)
        count, sink = scheme.rounded(side, length), min(scheme.sink, length)
        codes = np.zeros((self.heads, count, self.head_size), np.float32)
        for suffix, element, mine, slots in self._places(name, row, 0, count):
            parts = self._parts(name, row, suffix, slots)
            codes[:, mine] = rounding.decode(side, element, parts, self.head_size, self._steps[name])
        ends = [self._window(name, row, 0, sink), codes, self._window(name, row, sink + count, length)]
        return np.concatenate(ends, axis=1)

    def _parts(self, name: str, row: int, suffix: str, slots: np.ndarray) -> rounding.Parts:
        side, parts = self.scheme.side(name), {}
        for part in ("codes", "scale", "min", "signs", "gamma"):
            buffer = self.state.get(f"{name}{suffix}_{part}")
            if buffer is not None:
                grouped = side.along == "tokens" and part in ("scale", "min")
                parts[part] = buffer[row][:, slots[:: side.flush] // side.flush if grouped else slots]
        return parts

    def steps(self, name: str, row: int) -> np.ndarray:
        """The steps of each token of a row, float32 [H,length,G]; for a side without windows, in groups along
        channels."""
        return self.state[f"{name}_scale"][row][:, : self.lengths[row]].astype(np.float32)

    def query(self, queries: np.ndarray) -> np.ndarray:
        """Queries [Hq,S,D] as they meet the stored keys, float32: times the normalizer, and turned."""
        by_head = np.asarray(queries, np.float32).reshape(self.heads, -1, self.head_size)
        if self.scheme.normalize:
            by_head = by_head * self.constants.normalizer[:, None]
        if self._matrices["key"] is not None:
            by_head = turn(by_head, self._matrices["key"]).astype(np.float32)
        return by_head.reshape(queries.shape)

    def keys(self, row: int) -> np.ndarray:
        """A row's keys as they are read, float64 [H,length,D]: turned back, and multiplied by the
        normalizer."""
        back = self._turned_back("key", self.stored("key", row))
        return back * self.constants.normalizer[:, None] if self.scheme.normalize else back

    def values(self, row: int) -> np.ndarray:
        """A row's values as they are read, float64 [H,length,D]: turned back."""
        return self._turned_back("value", self.stored("value", row))

    def _turned_back(self, name: str, x: np.ndarray) -> np.ndarray:
        if self._matrices[name] is None:
            return x.astype(np.float64)
        return turn(x, self._matrices[name].swapaxes(-1, -2))
