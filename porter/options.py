"""Options: what a conversion may be told, and the pipeline that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from porter import kv, registry
from porter.drift.measure import SINGLE
from porter.errors import OptionError
from porter.kvgraph import grouped
from porter.pipeline import Pipeline
from porter.target import TargetSpec
from porter.weights.base import WeightPass

# Methods that are two: what makes the weights easy to cast, and what casts them.
PREPARED = {"smoothquant": ("quantize.smoothquant,", "rtn")}
# Passes that a form of quantized weights adds at the end.
FORMS = {"onnx": "", "contrib": ",quantize.contrib,kv.contrib"}

Progress = Callable[[str, float], None]
AUTO = "auto"  # in place of a weight format or a cache scheme: porter.search finds which


@dataclass(frozen=True)
class Options:
    """What a conversion may be told. Paths and texts are as the command line takes them."""

    target: str = "host"
    weights: str = ""
    kv: str = ""
    method: str = ""  # how weights are cast; "" rounds them to nearest
    activations: str = ""
    form: str = "onnx"  # or contrib: how bundle/model.onnx spells quantized weights and caches
    pipeline: str = ""
    budget: str = ""
    minimize: str = ""  # what `auto` makes small: bytes (the default), time or dollars
    latency: str = ""
    data: str = ""
    seed: int = 0
    context: int = 0
    decode: int = 0  # tokens before each context length that a quantized cache is measured on; 0: SINGLE
    keep: bool = False
    max_memory: str = ""
    calibration: str = ""
    repeat: str = ""  # the command that does this again, for the report
    progress: Progress = field(default=lambda stage, fraction: None, compare=False)


def searched(options: Options) -> bool:
    """Whether formats are to be searched for. Raises OptionError PORT-0632 for --minimize without a
    search."""
    if AUTO in (options.weights, options.kv):
        return True
    if options.minimize:
        what = "--minimize says what a search makes small, and nothing is searched for"
        raise OptionError("PORT-0632", what, hint="give --weights auto or --kv auto, or leave it out")
    return False


def pipeline_text(spec: TargetSpec, options: Options) -> str:
    """The target's pipeline with its slots filled, or the user's own.

    Raises OptionError PORT-0830 for a format or scheme that the target's kernels do not read, PORT-0835
    for both a pipeline and options that fill the target's, PORT-0258 and PORT-0259 for a method or form that
    is none; PassError PORT-0283 for a cache that the form cannot hold.
    """
    if options.form not in FORMS:
        what = f"there is no form {options.form!r}"
        raise OptionError("PORT-0259", what, where="--form", hint=f"forms: {', '.join(FORMS)}")
    if options.pipeline:
        if options.weights or options.kv or options.context or options.method or options.activations:
            what = "--pipeline says all that is done; --weights, --kv and --context would change nothing"
            raise OptionError("PORT-0835", what, hint="write them into the pipeline, or leave it out")
        return options.pipeline + FORMS[options.form]
    return filled(spec, options, weights_text(spec, options), kv_text(spec, options)) + FORMS[options.form]


def filled(spec: TargetSpec, options: Options, weights: str, kv: str) -> str:
    """The target's pipeline with passes in its slots, without those of the form."""
    limit = f"{{capacity={options.context}}}" if options.context else ""
    text = spec.pipeline.replace("kv.static_cache", f"kv.static_cache{limit}")
    return text.replace("{weights}", weights).replace("{kv}", kv)


def weights_text(spec: TargetSpec, options: Options) -> str:
    """The passes that cast weights and activations."""
    name, method = spec.flavour(options.weights) or "fp32", options.method or "rtn"
    if not spec.reads(name):
        raise _not_offered(spec, "weights", options.weights, spec.weights)
    if options.method:
        check_method(method, tuple(PREPARED))
        if name == "fp32":
            what = "--method says how weights are cast, and nothing says to which format"
            raise OptionError("PORT-0258", what, hint="give --weights FORMAT too, as int4-g32")
    before, method = PREPARED.get(method, ("", method))
    texts = [f"{before}quantize.{method}{{format={name}}}"] if name != "fp32" else []
    return ",".join([*texts, *activations_text(spec, options)])


def check_method(method: str, more: tuple[str, ...] = ()) -> None:
    """Raise OptionError PORT-0258 for a method that is no pass that casts weights, and none of `more`."""
    methods = [m for m in registry.builtin() if m.startswith("quantize.") and casts_weights(m)]
    known = [*(m.removeprefix("quantize.") for m in methods), *more]
    if method not in known:
        what = f"there is no method {method!r}"
        raise OptionError("PORT-0258", what, where="--method", hint=f"methods: {', '.join(known)}")


def activations_text(spec: TargetSpec, options: Options) -> list[str]:
    """The pass that rounds activations, if one is asked for. Raises OptionError PORT-0830."""
    texts = []
    if options.activations not in ("", "fp32"):
        wanted = spec.flavour(options.activations)
        if wanted not in spec.activations:
            raise _not_offered(spec, "activations", options.activations, spec.activations)
        texts.append(f"quantize.activations{{format={wanted}}}")
    return texts


def kv_text(spec: TargetSpec, options: Options) -> str:
    """The pass that quantizes the cache; the text of --kv is that of its options, the scheme's name first."""
    words = options.kv.split() or ["fp32"]
    name = words[0].removeprefix("scheme=")
    if "=" in name:
        name, words = "fp16", ["fp16", *words]
    elif name not in spec.kv:
        raise _not_offered(spec, "kv", name, spec.kv)
    scheme = kv.parse(" ".join(words))
    if options.form == "contrib":
        grouped.check(scheme)  # before any work
    return "kv.quantize{" + " ".join([f"scheme={name}", *words[1:]]) + "}" if words != ["fp32"] else ""


def _not_offered(spec: TargetSpec, slot: str, asked: str, offered: tuple[str, ...]) -> OptionError:
    what = f"{spec.name} has no {slot} format {asked!r}"
    return OptionError("PORT-0830", what, where=f"--{slot}", hint=f"it has: {', '.join(offered)}")


def casts_weights(name: str) -> bool:
    """Whether the pass of that name is a method that casts weights."""
    found = registry.find(name)
    return isinstance(found, type) and issubclass(found, WeightPass)


def single_tokens(pipeline: Pipeline, options: Options) -> int:
    """How many tokens before each context length are decoded one at a time; 0 where no cache is quantized.

    Raises OptionError PORT-0606 when that is asked for then.
    """
    if any(p.name == "kv.quantize" for p in pipeline.passes):
        return options.decode or SINGLE
    if options.decode:
        what = "no cache is quantized, so --decode would change nothing"
        raise OptionError("PORT-0606", what, hint="give --kv SCHEME too, or leave it out")
    return 0
