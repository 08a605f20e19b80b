"""Schemes by name, and the text of a scheme: `parse(str(scheme)) == scheme`.

    innerq recent=64 key=int8 value=int4-g32 rotate keep-first=1

A name of `PRESETS` (also `scheme=NAME`) comes first or not at all. Options override it, in any order: what
is for both sides also holds for those of `key=` and `value=`. These two take the text of a side, or the name
of a preset whose side it is. A side's text is its element (`uint2+uint4`: tokens with more bits are uint4),
then in any order `-gN` (groups of N), `-tokens` (groups along tokens), `-fp16` (of steps), `-hybrid`,
`-tensor` `-head` `-channel` (static), `-mixed`, `-residual`, `-rotate`. Options of both sides: `rotate` (or
`rotate=key`, `rotate=value`), `scales=fp16`, `static=head`. `layers=int8/int4:fp16/int8` has keys and values
of each layer in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from porter.errors import PassError
from porter.kv.scheme import STATIC, Scheme, Side

_KIVI = "recent=128"
_INNERQ = "recent=96 sink=32 normalize"
PRESETS = {
    "fp32": "key=fp32 value=fp32",
    "fp16": "key=fp16 value=fp16",
    "bf16": "key=bf16 value=bf16",
    "int8": "key=int8 value=int8",
    "int4": "key=int4 value=int4",
    "fp8": "key=e4m3fn-head value=e4m3fn-head",
    "fp8-dynamic": "key=e4m3fn value=e4m3fn",
    "kivi2": f"key=uint2-g32-tokens-fp16 value=uint2-g32-fp16 {_KIVI}",
    "kivi4": f"key=uint4-g32-tokens-fp16 value=uint4-g32-fp16 {_KIVI}",
    "innerq": f"key=int3-g32-fp16 value=int3-g32-tokens-fp16 {_INNERQ}",
    "innerq-small": f"key=int3-g32-fp16 value=int2-g32-tokens-fp16 {_INNERQ}",
    "innerq-hybrid": f"key=int3-g32-fp16 value=int2-g32-tokens-fp16-hybrid {_INNERQ}",
    "turboquant4": "key=lloyd4-fp16-rotate value=lloyd4-fp16-rotate",
    "turboquant3": "key=lloyd3-fp16-rotate value=lloyd3-fp16-rotate",
    "turboquant3.5": "key=lloyd3-fp16-rotate-mixed value=lloyd3-fp16-rotate-mixed",
    "turboquant2.5": "key=lloyd2-fp16-rotate-mixed value=lloyd2-fp16-rotate-mixed",
    "certified": "key=int8 value=int4-g32 copy=fp32 tolerance=0.5",
    "triaxial": "key=uint2+uint4-g32-fp16 value=uint2+uint4-g32-fp16 share=0.25 recent=128",
}
"""The text of every scheme that has a name."""

_COUNTS = ("recent", "sink", "keep-first", "keep-last")
_FLAGS = ("hybrid", "mixed", "residual", "rotate")


def parse(text: str) -> Scheme:
    """The scheme of a text. Raises PassError PORT-0270 for what cannot be read, PORT-0271 for what does not
    go together."""
    words = text.split()
    scheme = Scheme()
    if words and (name := words[0].removeprefix("scheme=")) in PRESETS:
        scheme, words = _with(scheme, PRESETS[name].split()), words[1:]
    return _with(scheme, words)


def text_of(scheme: Scheme) -> str:
    """The text that `parse` reads back to the same scheme, without names of presets."""
    words = [f"key={side_text(scheme.key)}", f"value={side_text(scheme.value)}"]
    words += [f"{name}={n}" for name in _COUNTS if (n := getattr(scheme, name.replace("-", "_")))]
    words += [f"high={scheme.high}"] if scheme.high != "fp16" else []
    words += ["normalize"] if scheme.normalize else []
    words += [f"{name}={n!r}" for name in ("share", "bits") if (n := getattr(scheme, name))]
    words += [f"copy={scheme.copy}"] if scheme.copy else []
    words += [f"tolerance={scheme.tolerance!r}"] if scheme.tolerance else []
    words += (
        [f"layers={':'.join('/'.join(map(side_text, pair)) for pair in scheme.layers)}"]
        if scheme.layers
        else []
    )
    return " ".join(words)


def side_text(side: Side) -> str:
    """The text of one side."""
    words = [side.element + (f"+{side.more}" if side.more else "")]
    words += [f"g{side.group}"] if side.group else []
    words += ["tokens"] if side.along == "tokens" else []
    words += ["fp16"] if side.scale == "fp16" else []
    words += [side.static] if side.static else []
    return "-".join(words + [flag for flag in _FLAGS if getattr(side, flag)])


def _with(scheme: Scheme, words: list[str]) -> Scheme:
    """The scheme with the words' options; it is checked as a whole, since a side and `share` go together."""
    fields: dict[str, object] = {"key": scheme.key, "value": scheme.value}
    for word in sorted(words, key=lambda word: not word.startswith(("key=", "value="))):
        name, equals, value = word.partition("=")
        if name not in _OPTIONS:
            names = ", ".join(PRESETS)
            raise _unread(word, f"the schemes are {names}; the options {', '.join(_OPTIONS)}")
        try:
            _OPTIONS[name](fields, name, value if equals else None)
        except ValueError:
            raise _unread(word, "write options as recent=96 or rotate") from None
    return replace(scheme, **fields)


def _count(fields: dict[str, object], name: str, value: str | None) -> None:
    if not value or not value.isdecimal():
        raise ValueError
    fields[name.replace("-", "_")] = int(value)


def _word(fields: dict[str, object], name: str, value: str | None) -> None:
    fields[name] = _given(value)


def _number(fields: dict[str, object], name: str, value: str | None) -> None:
    fields[name] = float(value or "")


def _flag(fields: dict[str, object], name: str, value: str | None) -> None:
    if value is not None:
        raise ValueError
    fields[name] = True


def _given(value: str | None) -> str:
    """The word after the equals sign; "" for `none`."""
    if not value:
        raise ValueError
    return "" if value == "none" else value


def _set_side(fields: dict[str, object], name: str, value: str | None) -> None:
    value = _given(value)
    if value in PRESETS and not _is_element(value):
        preset = parse(value)
        fields[name] = preset.side(name)
        if preset.tagged:
            fields.setdefault("share", preset.share)
    else:
        fields[name] = _side(value.split("-"), value)


def _layers(fields: dict[str, object], name: str, value: str | None) -> None:
    """Pairs of sides; a name of a scheme is its side, as in `key=` and `value=`."""
    pairs = []
    for text in _given(value).split(":"):
        key, value_ = text.split("/")
        pair: dict[str, object] = {}
        _set_side(pair, "key", key)
        _set_side(pair, "value", value_)
        pairs.append((pair["key"], pair["value"]))
    fields[name] = tuple(pairs)


def _both(change: Callable[[Side, str], Side]) -> Callable[[dict[str, object], str, str | None], None]:
    def apply(fields: dict[str, object], name: str, value: str | None) -> None:
        for side in ("key", "value"):
            fields[side] = change(fields[side], _given(value))

    return apply


def _rotate(fields: dict[str, object], name: str, value: str | None) -> None:
    if value not in (None, "key", "value"):
        raise ValueError
    for side in ("key", "value") if value is None else (value,):
        fields[side] = replace(fields[side], rotate=True)


_OPTIONS: dict[str, Callable[[dict[str, object], str, str | None], None]] = {
    "key": _set_side,
    "value": _set_side,
    **dict.fromkeys(_COUNTS, _count),
    "high": _word,
    "copy": _word,
    "share": _number,
    "bits": _number,
    "tolerance": _number,
    "layers": _layers,
    "normalize": _flag,
    "rotate": _rotate,
    "scales": _both(lambda side, value: replace(side, scale=value) if side.coded else side),
    "static": _both(lambda side, value: replace(side, static=value)),
}


def _side(words: list[str], text: str) -> Side:
    element, _, more = words[0].partition("+")
    fields: dict[str, object] = {"element": element, "more": more}
    for word in words[1:]:
        if re.fullmatch(r"g[1-9]\d{0,5}", word):
            fields["group"] = int(word[1:])
        elif word in ("fp16", "fp32"):
            fields["scale"] = word
        elif word in STATIC:
            fields["static"] = word
        elif word == "tokens":
            fields["along"] = word
        elif word in _FLAGS:
            fields[word] = True
        else:
            raise _unread(text, "write a side as int4-g32 or lloyd3-rotate-fp16")
    return Side(**fields)


def _is_element(name: str) -> bool:
    return PRESETS[name] == f"key={name} value={name}"


def _unread(word: str, hint: str) -> PassError:
    return PassError("PORT-0270", f"there is no cache scheme or option {word!r}", hint=hint)
