"""inspect: what a model or bundle is, as plain facts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from porter import decoder, graph
from porter.bundle import Bundle
from porter.errors import ModelError
from porter.foreign.found import quantized_by


def inspect(path: Path) -> dict[str, Any]:
    """Interface, operators, opsets and weights of an ONNX file; of a bundle, its manifest's facts too."""
    if path.is_dir():
        bundle = Bundle.open(path)
        facts = {k: bundle.manifest[k] for k in ("source", "pipeline", "seed", "machine", "versions")}
        return {**facts, "target": bundle.manifest["target"]["name"], "model": inspect(bundle.model)}
    model = graph.load(path)
    operators = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph)
    return {
        "name": path.name,
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".strip(),
        "opsets": dict(model.opset_imports),
        "inputs": [_tensor(v) for v in model.graph.inputs if not v.is_initializer()],
        "outputs": [_tensor(v) for v in model.graph.outputs],
        "interface": _interface(model),
        "operators": dict(operators.most_common()),
        "nodes": sum(operators.values()),
        "quantized_by": quantized_by(model),
        "weights": len(model.graph.initializers),
        "weight_bytes": graph.weight_bytes(model),
    }


def _tensor(value: Any) -> dict[str, Any]:
    shape = "?" if value.shape is None else "×".join(str(d) for d in value.shape)
    return {"name": value.name, "dtype": str(value.dtype), "shape": shape}


def _interface(model: Any) -> dict[str, Any]:
    try:
        found = asdict(decoder.recognise(model))
    except ModelError as error:
        return {"recognised": False, "why": str(error)}
    layers = len({c["layer"] for c in found.pop("caches")})
    return {"recognised": True, "layers_with_cache": layers, **{k: v for k, v in found.items() if v}}
