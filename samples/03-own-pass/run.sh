#!/usr/bin/env bash
# A pass from a file, in the middle of the built-in ones. Usage: run.sh [folder for what is made]
set -euo pipefail
mkdir -p "${1:-out}"
out=$(cd "${1:-out}" && pwd)
cd "$(dirname "$0")"

[ -f "$out/stories260k.onnx" ] || porter export ../stories260k -o "$out/stories260k.onnx"
porter explain hard_swish.py "$out/stories260k.onnx"
porter convert "$out/stories260k.onnx" -o "$out/hard" --pipeline "
    clean.opset, clean.constants, clean.shapes, clean.identity, clean.dead,
    fuse.rms_norm, fuse.rotary, fuse.attention, fuse.swiglu, hard_swish.py, fuse.matmul, clean.dead,
    kv.static_cache, clean.dead, check.support"
porter run "$out/hard" --prompt "Once upon a time" --max-new 32
