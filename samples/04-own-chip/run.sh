#!/usr/bin/env bash
# A chip that does not exist, from one file. Usage: run.sh
set -euo pipefail
cd "$(dirname "$0")"

porter targets ./tern.toml | sed -n 1,3p
porter estimate --config llama-3-8b.json --target ./tern.toml,h100,tpu-v6e --weights fp8 --activations fp8
porter estimate --config llama-3-8b.json --target ./tern.toml --batch 64
