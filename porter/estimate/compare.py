"""Compare: one model on several targets, and the table of them, most tokens for a dollar first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from porter import target
from porter.bundle import Bundle
from porter.errors import OptionError, PorterError
from porter.estimate.estimate import Estimate, Options, estimate, split
from porter.estimate.lowered import KERNELS, Lowered
from porter.estimate.model import Model
from porter.memory import shown

COLUMNS = ("name", "chips", "prefill", "step", "tok/s", "USD/Mtok", "J/tok", "GiB", "bound by")
SIMULATED = "Times are simulated: the program in the bundle, call by call. Memory is estimated."
MIXED = (
    "~: times are estimated, by a roofline of the graph. Without it they are simulated: the program in the",
    "bundle, call by call. Memory is estimated.",
)
NOTES = (
    "prefill: a batch of prompts; step: one token for the whole batch, its cache at the asked context.",
    "USD/Mtok, J/tok: of decoded tokens, on demand (*: spot or reserved), at rated power. GiB: of a chip.",
)


@dataclass(frozen=True)
class Compared:
    """Estimates, most tokens for a dollar first, why some targets have none, and the program of the bundle
    that was asked about, if it was one."""

    estimates: tuple[Estimate, ...]
    left_out: dict[str, str]
    lowered: Lowered | None = None


def load_lowered(model: Path | None) -> Lowered | None:
    """The scheduled program of a bundle for a chip of family tile; None for all else, and for bundles of a
    porter that kept no such program. Raises what reading it raises."""
    if model is None or not (model / KERNELS).is_file():
        return None
    return Lowered.read(model, Bundle.open(model).decoder)


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


def compare(model: Model, names: str, options: Options, lowered: Lowered | None = None) -> Compared:
    """Estimates on the targets of a list with commas, or on `all` that say enough; "" is the target of
    `lowered`, or `all` where there is none.

    On its own target `lowered` is simulated. Raises what `estimate` does, but for `all`, where a target
    without an estimate is left out; OptionError PORT-0337 when none is left.
    """
    if lowered and not names.strip():
        return Compared((estimate(model, lowered.spec, options, _asked(lowered, options)),), {}, lowered)
    every = names.strip() in ("", "all")
    wanted = target.names() if every else [name.strip() for name in names.split(",") if name.strip()]
    found, left_out = [], {}
    for name in dict.fromkeys(wanted):
        try:
            spec = target.load(name)
            own = lowered if lowered and spec == lowered.spec else None
            found.append(estimate(model, spec, options, own and _asked(own, options)))
        except PorterError as error:
            if not every:
                raise
            left_out[name] = error.what
    if not found:
        why = next(iter(left_out.values()), "no target is named")
        raise OptionError("PORT-0337", f"no target has an estimate: {why}", where="--target")
    return Compared(tuple(sorted(found, key=_order)), left_out, lowered)


def _asked(lowered: Lowered, options: Options) -> Lowered | None:
    """The program, unless another one is asked about: over more chips, or in other formats."""
    other = options.tp > 1 or options.weights or options.activations or options.kv
    return None if other else lowered


def _order(found: Estimate) -> tuple[bool, bool, float, str]:
    """Those that fit, then those with a price, cheapest first, then the fastest chip."""
    price = found.usd_per_mtok
    worth = price if price is not None else -found.tokens_per_s / found.options.tp
    return not found.fits, price is None, worth, found.target


def row(found: Estimate, mixed: bool = False) -> dict[str, str]:
    """An estimate for people; of one that does not fit, how many chips would do, and no figures of time.

    Beside simulated ones (`mixed`), estimated times have a `~`.
    """
    about = "~" if mixed and found.kind == "estimated" else ""
    texts = {
        "prefill": about + _seconds(found.prefill_s),
        "step": about + _seconds(found.decode_s),
        "tok/s": f"{found.tokens_per_s:,.0f}" if found.tokens_per_s >= 10 else f"{found.tokens_per_s:.2g}",
        "USD/Mtok": _number(found.usd_per_mtok) + ("*" if found.terms in ("spot", "reserved") else ""),
        "J/tok": _number(found.joules_per_token),
        "bound by": found.bound_by,
    }
    if not found.fits:
        texts = dict.fromkeys(texts, "–")
    chips = f"{found.chips}" if found.fits else f"needs {found.chips}"
    return {"name": found.target, "chips": chips, "GiB": _gib(found.bytes.total)} | texts


def rows(compared: Compared) -> list[dict[str, str]]:
    """All of them, in order."""
    mixed = len({each.kind for each in compared.estimates}) > 1
    return [row(each, mixed) for each in compared.estimates]


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _gib(size: float) -> str:
    if size < 0.01 * 2**30:
        return "< 0.01"
    return f"{size / 2**30:.3g}" if size < 100 * 2**30 else f"{size / 2**30:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def lines(compared: Compared) -> Sequence[str]:
    """What stands under the table: what a lone target spends time on, what is assumed, who is left out."""
    simulated = [each for each in compared.estimates if each.program]
    found = [*NOTES]
    if len(simulated) == len(compared.estimates):
        found.append(SIMULATED)
    else:
        found += MIXED if simulated else ["All figures are estimated."]
    for each in simulated:
        found += _of_program(each)
    if compared.lowered and not simulated:
        found += _why_not(compared.lowered, compared.estimates)
    if len(compared.estimates) == 1:
        found += _details(compared.estimates[0])
    assumed: dict[str, list[str]] = {}
    for each in compared.estimates:
        if each.assumed:
            assumed.setdefault(", ".join(each.assumed), []).append(each.target)
    found += [f"assumed, not measured ({names}) on {', '.join(on)}" for names, on in assumed.items()]
    found += [f"{name}: left out: {why}" for name, why in compared.left_out.items()]
    return found


def _of_program(found: Estimate) -> list[str]:
    """What a simulation leaves out."""
    assert found.program
    rows, texts = found.program["rows"], []
    if found.options.batch > rows:
        texts.append(f"{found.target}: the bundle's memory is planned for {rows} rows at most")
    step = found.program["decode"]
    by_reason: dict[str, list[str]] = {}
    for each in step["not_simulated"]:
        by_reason.setdefault(each["why"], []).append(f"{each['name']} ({each['calls']})")
    texts += [
        f"{found.target}: not simulated, no time of a step: {', '.join(names)}: {why}"
        for why, names in by_reason.items()
    ]
    return texts


def _why_not(lowered: Lowered, estimates: Sequence[Estimate]) -> list[str]:
    """Why the bundle's own target was not simulated."""
    name = lowered.spec.name
    if name not in [each.target for each in estimates]:
        return []
    if target.names().count(name) and target.load(name) != lowered.spec:
        return [f"{name}: not simulated: its file is another one than the bundle was made for"]
    return [f"{name}: not simulated: the program in the bundle is for one chip, in the formats that it has"]


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
