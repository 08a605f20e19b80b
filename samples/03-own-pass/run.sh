#!/usr/bin/env bash
# A pass from a file, in the middle of the built-in ones. Usage: run.sh [folder for what is made]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out}
model=$out/stories260k.onnx
pass=$here/hard_swish.py

[ -f "$model" ] || porter export "$here/../stories260k" -o "$model"
porter explain "$pass" "$model"
porter convert "$model" -o "$out/hard" --pipeline "
    clean.opset, clean.constants, clean.shapes, clean.identity, clean.dead,
    fuse.rms_norm, fuse.rotary, fuse.attention, fuse.swiglu, $pass, fuse.matmul, clean.dead,
    kv.static_cache, clean.dead, check.support"
porter run "$out/hard" --prompt "Once upon a time" --max-new 32
