"""The command line: arguments in, text and exit code out. What is heavy is imported inside the commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from porter import __version__
from porter.errors import OptionError, PorterError

if TYPE_CHECKING:
    from porter.options import Options
    from porter.report.report import DriftReport
    from porter.terminal import Stages

app = typer.Typer(
    name="porter",
    help="Port a model to an accelerator it was not made for, and say what the port costs.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
Data = Annotated[
    str,
    typer.Option(
        help="Text (.txt, .json) or token ids (.npy, .json) to measure on, or 'random'. "
        "Default: text the model writes itself."
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        help="Text or token ids, as for --data, for passes that look at activations, or 'random'. "
        "Default: text the model writes itself."
    ),
]
Form = Annotated[
    str, typer.Option(help="Quantized weights and caches in model.onnx: onnx, or contrib (com.microsoft).")
]
DecodeSteps = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens before each context length that go one by one through a quantized cache when drift is "
        "measured (0: 16; as many as the context: all).",
    ),
]
Target = Annotated[str, typer.Option(help="A target's name (porter targets) or the path of its .toml.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]
Budget = Annotated[
    str, typer.Option(help="Drift allowed, as kl=0.02,top1=0.97; exit code 3 when it is exceeded.")
]


CacheTokens = Annotated[
    int, typer.Option(min=0, help="Tokens the cache holds (0: what the model was made for).")
]
Weights = Annotated[
    str, typer.Option(help="Weight format, as int4-g32; auto: the cheapest of each weight in the budget.")
]
Method = Annotated[
    str, typer.Option(help="How weights are cast to it: a pass quantize.METHOD. Default: rtn.")
]
Scheme = Annotated[
    str, typer.Option(help="KV-cache scheme, as kivi2, with options: 'kivi2 recent=64'; or auto.")
]
Minimize = Annotated[str, typer.Option(help="What auto makes small: bytes (default), time, dollars.")]
Latency = Annotated[
    str, typer.Option(help="How long a decode step may take by the estimate, as 100ms; else exit code 3.")
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep a bundle that is over budget.")]
MaxMemory = Annotated[
    str, typer.Option(help="Memory that it may take, as 4GiB; refused at once when that is too little.")
]


class Interrupted(BaseException):
    """Ctrl-C or a request to end: unlike KeyboardInterrupt, no library on the way answers it for us."""


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main() -> None:
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        try:
            app(arguments, prog_name="porter")
        finally:
            sys.stdout.flush()  # here, where a closed pipe is not yet a message of the interpreter's
    except PorterError as error:
        if debug:
            raise
        print(f"porter: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as interrupted:
        kept = interrupted.args[1] if len(interrupted.args) > 1 else "nothing was written"
        print(f"porter: interrupted; {kept}", file=sys.stderr)
        sys.exit(128 + interrupted.args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        print(
            f"porter: PORT-0999: a bug in porter: {what}; run again with --debug and report it",
            file=sys.stderr,
        )
        sys.exit(70)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Options that stand before a command."""
    if version:
        print(f"porter {__version__}")
        raise typer.Exit


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A local Hugging Face folder, or package.module:factory.")],
    output: Out,
    opset: Annotated[int, typer.Option(help="ONNX opset, 23 or newer.")] = 23,
    json_: Json = False,
) -> None:
    """Export a PyTorch model to ONNX with an explicit KV cache, and check it against PyTorch."""
    from porter.export import export as run
    from porter.report.report import plain
    from porter.terminal import Stages

    with Stages(quiet=json_) as stages:
        report = run(source, output, opset=opset, progress=stages.named)
    _answer(plain(report), json_, lambda: print(report.summary()))


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Out,
    target: Target = "host",
    weights: Weights = "",
    method: Method = "",
    activations: Annotated[str, typer.Option(help="Format that linear layers multiply in, as int8.")] = "",
    form: Form = "onnx",
    kv: Scheme = "",
    pipeline: Annotated[str, typer.Option(help="Passes to run instead of the target's own.")] = "",
    budget: Budget = "",
    minimize: Minimize = "",
    latency: Latency = "",
    data: Data = "",
    seed: Seed = 0,
    context: CacheTokens = 0,
    decode: DecodeSteps = 0,
    calibration: Calibration = "",
    keep: Keep = False,
    max_memory: MaxMemory = "",
    json_: Json = False,
) -> None:
    """Port a model to a target: a bundle, and a report of how far its output drifted."""
    from porter.options import Options

    with _stages(json_) as stages:
        options = Options(
            target=target,
            weights=weights,
            kv=kv,
            method=method,
            activations=activations,
            form=form,
            pipeline=pipeline,
            budget=budget,
            minimize=minimize,
            latency=latency,
            data=data,
            seed=seed,
            context=context,
            decode=decode,
            keep=keep,
            max_memory=max_memory,
            calibration=calibration,
            repeat=_command(),
            progress=stages.update,
        )
        report = _converted(model, output, options, stages, json_)
    _say(report, output, json_)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or an ONNX decoder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[str, typer.Option(help="Token ids to continue, as 1,2,3.")] = "",
    max_new: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that reach this share.")] = 1.0,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Generate text with a bundle; it streams to stdout."""
    from porter.drift.measure import Runnable
    from porter.generate import stream

    model = Runnable.of(bundle)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    ids = [int(t) for t in tokens.split(",")] if _are_ints(tokens) else None
    if tokens and ids is None:
        raise OptionError(
            "PORT-0832", f"{tokens!r} is not a list of token ids", where="--tokens", hint="as 1,2,3"
        )
    made = stream(model, prompt, ids, max_new, sampling, None if json_ else _write)
    _answer(made.to_dict(), json_, lambda: print(f"\n{made.summary()}", file=sys.stderr))


@app.command()
def diff(
    a: Annotated[
        Path,
        typer.Argument(
            help="The reference: an ONNX file or a bundle. Alone, with --against: a bundle or a report.json."
        ),
    ],
    b: Annotated[
        Path | None, typer.Argument(help="What is measured against it: an ONNX file or a bundle.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="An earlier report.json, or its bundle; exit code 3 when a measure got worse."),
    ] = None,
    budget: Budget = "",
    data: Data = "",
    seed: Seed = 0,
    blame: Annotated[bool, typer.Option("--blame", help="Find the nodes that the drift comes from.")] = False,
    json_: Json = False,
) -> None:
    """Measure how far B's output is from A's, on prefill and on cached decode steps; or a report from an
    earlier one."""
    from porter.diff import diff as run
    from porter.report import baseline
    from porter.terminal import Stages, print_against, print_blame, print_report

    if against is not None:
        baseline.read(against)  # before any work
    report = found = None
    if b is not None:
        with Stages(quiet=json_) as stages:
            found = _blamed(a, b, data, seed, stages.update) if blame else None
            options = {"budget": budget, "data": data, "seed": seed, "repeat": _command()}
            nodes = found.nodes() if found else ()
            report = run(a, b, progress=stages.update, nodes=nodes, **options)
    elif against is None:
        hint = "porter diff A B, or --against BASELINE"
        raise OptionError("PORT-0623", "there is nothing to measure it against", where=str(a), hint=hint)
    document = report.to_dict() if report is not None else baseline.read(a)
    beside = baseline.against(document, against) if against is not None else None

    def show() -> None:
        if report is not None:
            print_report(report)
        if found is not None:
            print_blame(found)
        if beside is not None:
            print_against(beside)

    _answer(document | ({"against": beside.to_json()} if beside is not None else {}), json_, show)
    if report is not None and not report.ok:
        from porter.convert import over_budget

        raise over_budget(report)
    if beside is not None and not beside.ok:
        raise beside.refusal()


@app.command()
def blame(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="The ONNX file or bundle to compare with. Default: what the bundle was made from."),
    ] = None,
    data: Data = "",
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(min=1, help="Texts that run side by side.")] = 4,
    top: Annotated[int, typer.Option(min=0, help="Nodes that are tried by substitution.")] = 6,
    repro: Annotated[
        Path | None, typer.Option(help="A folder for the worst node: its ONNX, inputs and a command.")
    ] = None,
    json_: Json = False,
) -> None:
    """Find the nodes of a bundle that its drift comes from: ONNX node, PyTorch module, pass and kernel."""
    from porter.blame import blame_bundle, note
    from porter.terminal import Stages, print_blame

    options = {"data": data, "seed": seed, "samples": samples, "top": top, "out": repro}
    with Stages(quiet=json_) as stages:
        found = blame_bundle(bundle, reference, progress=stages.update, **options)
    note(bundle, found)
    _answer(found.to_dict(), json_, lambda: print_blame(found))


def _blamed(a: Path, b: Path, data: str, seed: int, progress: Any) -> Any:
    from porter.blame import run

    return run(a, b, data=data, seed=seed, progress=progress)


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="A bundle.")], json_: Json = False) -> None:
    """Check every file of a bundle against its digest."""
    from porter.bundle import Bundle

    count = Bundle.open(bundle).verify()
    _answer(
        {"ok": True, "files": count}, json_, lambda: print(f"{bundle}: {count} files are what was written")
    )


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX file or a bundle.")], json_: Json = False
) -> None:
    """Show what a model is: interface, operators, opsets, weights."""
    from porter.inspect import inspect as run
    from porter.terminal import print_facts

    facts = run(model)
    _answer(facts, json_, lambda: print_facts(facts))


@app.command()
def explain(
    rule: Annotated[str, typer.Argument(help="A rewriting pass, as fuse.rms_norm, or a .py file.")],
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    json_: Json = False,
) -> None:
    """Say where a rewrite almost applied, and which condition failed."""
    from porter.explain import explain as run
    from porter.terminal import print_explanation

    found = run(rule, model)
    _answer(found, json_, lambda: print_explanation(found))


@app.command()
def estimate(
    model: Annotated[Path | None, typer.Argument(help="An ONNX decoder or a bundle.")] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Targets with commas between: names, paths of a .toml, or 'all'. Default: that of a bundle "
            "for a chip of family tile, else all."
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face config.json instead of a model; no weights are needed."),
    ] = None,
    weights: Annotated[str, typer.Option(help="Weight format. Default: what the model has, else bf16.")] = "",
    activations: Annotated[str, typer.Option(help="Format that linear layers multiply in, as fp8.")] = "",
    kv: Annotated[str, typer.Option(help="KV-cache scheme. Default: what the model has, else fp16.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of a prompt (0: 512, or as many as the model takes).")
    ] = 0,
    context: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens in the cache when a step is timed (0: 4096, or as many as the model takes)."
        ),
    ] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Chips that share each matrix.")] = 1,
    json_: Json = False,
) -> None:
    """Estimate times, memory, chips, price and energy of a decoder on targets."""
    from porter.estimate import Options, compare
    from porter.report.words import clean
    from porter.terminal import print_rows

    options = Options(weights, activations, kv, batch, prompt, context, tp)
    lowered = compare.load_lowered(model)
    found = compare.compare(compare.load_model(model, config), target, options, lowered)

    def table() -> None:
        print_rows(compare.rows(found), compare.COLUMNS)
        print(*map(clean, compare.lines(found)), sep="\n")

    _answer([e.to_dict() for e in found.estimates], json_, table)


Sheet = Annotated[
    Path, typer.Option("-o", "--output", help="Folder of the results; finished cells are used.")
]
Targets = Annotated[str, typer.Option(help="Targets with commas between: names, paths of a .toml, or 'all'.")]
Workers = Annotated[int, typer.Option(min=0, help="Cells at a time (0: one a core).")]
Tokens = Annotated[
    int, typer.Option(min=0, help="Tokens that a cache holds; a step is timed at them (0: the model's own).")
]
Kept = Annotated[
    str, typer.Option(help="Drift allowed, as kl=0.02,top1=0.97; exit code 3 when no cell keeps it.")
]


@app.command()
def sweep(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Sheet,
    targets: Targets,
    weights: Annotated[str, typer.Option(help="Weight formats with commas between.")] = "fp32",
    kv: Annotated[str, typer.Option(help="KV-cache schemes with commas between.")] = "fp32",
    activations: Annotated[str, typer.Option(help="Formats that linear layers multiply in.")] = "fp32",
    method: Annotated[str, typer.Option(help="How weights are cast: a pass quantize.METHOD.")] = "",
    budget: Kept = "",
    data: Data = "",
    calibration: Calibration = "",
    seed: Seed = 0,
    context: Tokens = 0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, for the estimate.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows, for the estimate.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the bundles.")] = False,
    workers: Workers = 0,
    ray: Annotated[str, typer.Option(help="Address of a Ray cluster; 'local': one on this machine.")] = "",
    json_: Json = False,
) -> None:
    """Port a model to many targets in many formats: drift, bytes and tokens for a dollar side by side."""
    from porter.sweep import swept
    from porter.sweep.matrix import Matrix, Options
    from porter.sweep.sweep import sweep as run
    from porter.terminal import Stages

    matrix = Matrix.of(targets=targets, weights=weights, kv=kv, activations=activations)
    with Stages(quiet=json_) as stages:
        options = Options(
            method=method,
            budget=budget,
            data=data,
            calibration=calibration,
            seed=seed,
            context=context,
            prompt=prompt,
            batch=batch,
            keep=keep,
            workers=workers,
            ray=ray,
            repeat=_command(),
            progress=lambda fraction, note: stages.update("sweep", fraction, note),
        )
        try:
            found = run(model, output, matrix, options)
        except Interrupted as interrupted:
            raise Interrupted(interrupted.args[0], f"finished cells are kept in {output}") from None
    _answer(found.to_dict(), json_, lambda: swept.show(found))
    if (failure := found.failure()) is not None:
        raise failure


@app.command()
def passes(json_: Json = False) -> None:
    """List the passes."""
    from porter.registry import describe
    from porter.terminal import print_rows

    rows = describe()
    _answer(rows, json_, lambda: print_rows(rows, ("name", "promise", "what")))


@app.command()
def targets(
    name: Annotated[str, typer.Argument(help="Show this one in full: a name, or the path of a .toml.")] = "",
    json_: Json = False,
) -> None:
    """List the targets, or show one, with the source of every figure."""
    from porter import target
    from porter.report.words import clean
    from porter.target import showing
    from porter.terminal import print_rows

    if name:
        spec = target.load(name)
        _answer(spec.to_dict(), json_, lambda: print(*map(clean, showing.lines(spec)), sep="\n"))
        return
    specs = [target.load(n) for n in target.names()]

    def table() -> None:
        print_rows([showing.row(s) for s in specs], showing.COLUMNS)
        print(showing.NOTE)

    _answer([showing.summary(s) for s in specs], json_, table)


def _stages(quiet: bool) -> Stages:
    from porter.terminal import Stages

    return Stages(quiet=quiet)


def _converted(model: Path, output: Path, options: Options, stages: Stages, json_: bool) -> DriftReport:
    """Convert; a report of what is over budget is shown before the error goes on."""
    from porter.convert import convert as run
    from porter.terminal import print_report

    try:
        return run(model, output, options)
    except PorterError as error:
        if (failed := getattr(error, "report", None)) is not None:
            stages.stop()
            _answer(failed.to_dict(), json_, lambda: print_report(failed))
        raise


def _say(report: DriftReport, output: Path, json_: bool) -> None:
    """The report of a bundle that was written, and the refusal of one that is over budget and kept."""
    from porter.convert import over_budget
    from porter.terminal import print_report

    _answer(report.to_dict(), json_, lambda: print_report(report))
    if not report.ok:
        raise over_budget(report)
    if not json_:
        print(f"bundle: {output}\nreport: {output / 'report.html'}")


def _answer(document: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        show()


def _command() -> str:
    import shlex

    return shlex.join(["porter", *sys.argv[1:]])


def _are_ints(text: str) -> bool:
    return bool(text) and all(part.strip().isdigit() for part in text.split(","))


def _write(text: str) -> None:
    print(text, end="", flush=True)
