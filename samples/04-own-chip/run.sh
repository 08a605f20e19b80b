#!/usr/bin/env bash
# A chip that does not exist, from one file. Usage: run.sh [folder for what is made]
set -euo pipefail
mkdir -p "${1:-out}"
out=$(cd "${1:-out}" && pwd)
cd "$(dirname "$0")"

porter targets ./tern.toml | sed -n 1,3p
porter estimate --config llama-3-8b.json --target ./tern.toml,h100,tpu-v6e --weights fp8 --activations fp8
porter estimate --config llama-3-8b.json --target ./tern.toml --batch 64

[ -f "$out/stories260k.onnx" ] || porter export ../stories260k -o "$out/stories260k.onnx"
porter convert "$out/stories260k.onnx" --target ./tern.toml --weights fp8 --activations fp8 -o "$out/tern"
porter estimate "$out/tern" --batch 8 --prompt 128 --context 256
