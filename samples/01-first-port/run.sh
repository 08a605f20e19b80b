#!/usr/bin/env bash
# PyTorch weights in, a program for this machine's CPU and a sentence out. Usage: run.sh [folder for what is made]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out}

porter export "$here/../stories260k" -o "$out/stories260k.onnx"
porter convert "$out/stories260k.onnx" --weights int8 --kv int8 --budget kl=0.01,top1=0.95 -o "$out/stories260k"
porter run "$out/stories260k" --prompt "Once upon a time" --max-new 32
