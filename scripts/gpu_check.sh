#!/usr/bin/env bash
# What a GPU says of this version: the results of its CUDA kernels and their speed (under 9 minutes), whole models on
# the CUDA runtime (--engine, under 5 minutes), the kernels' tests under compute-sanitizer (--sanitize).
# Needs this repository, python3 with torch, numpy, msgspec and cupy-cuda13x, and NVRTC (nvidia-cuda-nvrtc, which comes
# with CUDA builds of torch); pytest too for tests/gpu; all of llmctl's dependencies for what --engine serves over HTTP.
#   scripts/gpu_check.sh [--output FOLDER] [--seconds N] [--no-tests]      writes gpu_check.json and gpu_check.md
#   scripts/gpu_check.sh --engine [--output FOLDER] [--seconds N] [--parts right,rates,…] [--trial COMMAND]
#                                                                          writes gpu_engine.json, .md and .svg
#   scripts/gpu_check.sh --sanitize [--seconds N] [--jobs N]               a line for every tool
# Exit codes: 0 done, 1 a check failed, 3 no usable GPU (or no compute-sanitizer) here.
set -euo pipefail
cd "$(dirname "$0")/.."
script=gpu_check
case "${1:-}" in
    --engine) script=gpu_engine; shift ;;
    --sanitize) script=gpu_sanitize; shift ;;
esac
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" "scripts/$script.py" "$@"
