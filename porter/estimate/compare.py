"""Compare: one model on several targets, and the table of them, most tokens for a dollar first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from porter import target
from porter.errors import OptionError, PorterError
from porter.estimate.estimate import Estimate, Options, estimate, split
from porter.estimate.model import Model
from porter.memory import shown

COLUMNS = ("name", "chips", "prefill", "step", "tok/s", "USD/Mtok", "J/tok", "GiB", "bound by")
NOTES = (
    "prefill: a batch of prompts; step: one token for the whole batch, its cache at the asked context.",
    "USD/Mtok, J/tok: of decoded tokens, on demand (*: spot or reserved), at rated power. GiB: of a chip.",
)


@dataclass(frozen=True)
class Compared:
    """Estimates, most tokens for a dollar first, and why some targets have none."""

    estimates: tuple[Estimate, ...]
    left_out: dict[str, str]


def load_model(model: Path | None, config: Path | None) -> Model:
    """The model that is asked about. Raises OptionError PORT-0336 unless just one of both is given."""
    if (model is None) == (config is None):
        what = "give a model or --config, one of them"
        raise OptionError(
            "PORT-0336", what, hint="porter estimate MODEL, or porter estimate --config config.json"
        )
    if config is not None:
        from porter.estimate.config import read as of_config

        return of_config(config)
    from porter.estimate.onnx import read as of_graph

    assert model is not None
    return of_graph(model)


def compare(model: Model, names: str, options: Options) -> Compared:
    """Estimates on the targets of a list with commas, or on `all` that say enough.

    Raises what `estimate` does, but for `all`, where a target without an estimate is left out; OptionError
    PORT-0337 when none is left.
    """
    every = names.strip() == "all"
    wanted = target.names() if every else [name.strip() for name in names.split(",") if name.strip()]
    found, left_out = [], {}
    for name in dict.fromkeys(wanted):
        try:
            found.append(estimate(model, target.load(name), options))
        except PorterError as error:
            if not every:
                raise
            left_out[name] = error.what
    if not found:
        why = next(iter(left_out.values()), "no target is named")
        raise OptionError("PORT-0337", f"no target has an estimate: {why}", where="--target")
    return Compared(tuple(sorted(found, key=_order)), left_out)


def _order(found: Estimate) -> tuple[bool, bool, float, str]:
    """Those that fit, then those with a price, cheapest first, then the fastest chip."""
    price = found.usd_per_mtok
    worth = price if price is not None else -found.tokens_per_s / found.options.tp
    return not found.fits, price is None, worth, found.target


def row(found: Estimate) -> dict[str, str]:
    """An estimate for people; of one that does not fit, how many chips would do, and no figures of time."""
    texts = {
        "prefill": _seconds(found.prefill_s),
        "step": _seconds(found.decode_s),
        "tok/s": f"{found.tokens_per_s:,.0f}" if found.tokens_per_s >= 10 else f"{found.tokens_per_s:.2g}",
        "USD/Mtok": _number(found.usd_per_mtok) + ("*" if found.terms in ("spot", "reserved") else ""),
        "J/tok": _number(found.joules_per_token),
        "bound by": found.bound_by,
    }
    if not found.fits:
        texts = dict.fromkeys(texts, "–")
    chips = f"{found.chips}" if found.fits else f"needs {found.chips}"
    return {"name": found.target, "chips": chips, "GiB": _gib(found.bytes.total)} | texts


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}" if size < 100 * 2**30 else f"{size / 2**30:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def lines(compared: Compared) -> Sequence[str]:
    """What stands under the table: what a lone target spends time on, what is assumed, who is left out."""
    kinds = dict.fromkeys(each.kind for each in compared.estimates)
    found = [*NOTES, f"All figures are {' or '.join(kinds)}."]
    if len(compared.estimates) == 1:
        found += _details(compared.estimates[0])
    assumed: dict[str, list[str]] = {}
    for each in compared.estimates:
        if each.assumed:
            assumed.setdefault(", ".join(each.assumed), []).append(each.target)
    found += [f"assumed, not measured ({names}) on {', '.join(on)}" for names, on in assumed.items()]
    found += [f"{name}: left out: {why}" for name, why in compared.left_out.items()]
    return found


def _details(found: Estimate) -> list[str]:
    share: Callable[[float, float], str] = lambda part, whole: f"{100 * part / whole:.0f} %"  # noqa: E731
    held = found.bytes
    memory = f"weights {shown(held.weights)}, cache {shown(held.kv)}, workspace {shown(held.workspace)}"
    texts = [f"memory of one chip: {memory}"]
    if not found.fits:
        return [*texts, f"it does not fit; it would on {found.chips} chips: --tp {found.chips}"]
    for name, parts in (("prefill", found.prefill), ("decode step", found.decode)):
        whole = sum(part.seconds for part in parts)
        bounds = ", ".join(f"{b} {share(t, whole)}" for b, t in split(parts).items() if t)
        longest = sorted(parts, key=lambda part: -part.seconds)[:5]
        kernels = ", ".join(f"{p.work.name} {share(p.seconds, whole)}" for p in longest)
        texts += [f"{name}: {bounds}", f"{name}: {kernels}"]
    return texts
