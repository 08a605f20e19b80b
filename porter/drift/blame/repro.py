"""A repro: one piece of a model by itself, with its inputs and what it should make of them.

piece.onnx      the site's nodes and weights; of a lowered program what its kernel should compute
inputs.npz      the reference's values at its inputs, at the step where it is furthest off
expected.npz    the reference's value at its output
model.so        of a lowered program: the library; arguments.npz has the kernel's arguments before the call
repro.json      names, and the command that runs it: `python -m porter.drift.blame.replay FOLDER`
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import graph
from porter.context import Feeds
from porter.drift.blame.align import Alignment
from porter.drift.blame.blame import Stage, Suspect
from porter.drift.blame.pieces import piece_model
from porter.drift.blame.shelf import Shelf
from porter.drift.blame.sides import Side
from porter.errors import EnvironmentFailure

PIECE, INPUTS, EXPECTED, FACTS = "piece.onnx", "inputs.npz", "expected.npz", "repro.json"
LIBRARY, ARGUMENTS = "model.so", "arguments.npz"


def write(
    out: Path, suspect: Suspect, stage: Stage, reference: Side, candidate: Side, steps: Sequence[np.ndarray]
) -> str:
    """Write the suspect's repro to the folder `out`; the command that runs it.

    Raises EnvironmentFailure PORT-0903 when the folder cannot be written.
    """
    site = suspect.site
    worst = int(np.argmin([v if not math.isnan(v) else -math.inf for v in suspect.steps_db]))
    found = _captured(suspect, stage.aligned, reference, candidate, steps[: worst + 1])
    command = f"python -m porter.drift.blame.replay {out}"
    facts = {
        "node": site.name,
        "op": site.op,
        "module": site.module,
        "pass": site.made_by,
        "stage": suspect.stage,
        "value": site.value,
        "step": worst,
        "slots": site.value in stage.aligned.slots,
        "command": command,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        graph.save(_piece(candidate.model, suspect, found.inputs), out / PIECE)
        np.savez(out / INPUTS, **found.inputs)
        np.savez(out / EXPECTED, expected=found.expected)
        if found.call is not None:
            shutil.copyfile(found.call.library, out / LIBRARY)
            np.savez(out / ARGUMENTS, *found.call.arguments)
            facts |= {"kernel": found.call.kernel, "argument": found.call.result}
        (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFailure(
            "PORT-0903", f"cannot write there: {error.strerror}", where=str(out)
        ) from error
    return command


def _piece(model: ir.Model, suspect: Suspect, inputs: Feeds) -> ir.Model:
    value = next(v for n in suspect.site.nodes for v in n.outputs if v.name == suspect.site.value)
    return piece_model(model, list(suspect.site.nodes), [value], inputs.__getitem__)


class _captured:
    """What goes into a site and should come out of it at the last of `steps`; `call` of a lowered one."""

    def __init__(
        self,
        suspect: Suspect,
        aligned: Alignment,
        reference: Side,
        candidate: Side,
        steps: Sequence[np.ndarray],
    ) -> None:
        site, pairs, shelf = suspect.site, aligned.pairs, Shelf()
        lead = reference.player({*pairs.values()}, ())
        player = candidate.player((), {*pairs})

        def given(name: str) -> np.ndarray:
            return aligned.given(name, shelf[pairs[name]])

        for i, tokens in enumerate(steps):
            shelf.clear()
            if i == len(steps) - 1:
                player.tap(site.value)
            lead.step(tokens, given, shelf.put)
            player.step(tokens, given, lambda name, array: None)
        fed = player.fed
        self.inputs = {n: given(n) if n in pairs else np.asarray(fed[n]) for n in site.inputs}
        self.expected = shelf[pairs[site.value]]
        self.call = player.call
