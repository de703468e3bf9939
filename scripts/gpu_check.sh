#!/usr/bin/env bash
# Correctness of the CUDA kernels on this machine's GPU, then their speed on real-model shapes, in under 9 minutes.
# Needs this repository, python3 with torch, numpy, msgspec and cupy-cuda13x, and NVRTC (nvidia-cuda-nvrtc, which comes
# with CUDA builds of torch); pytest too for the whole of tests/gpu.
#   scripts/gpu_check.sh [--output FOLDER] [--seconds N] [--no-tests]
# Writes gpu_check.json and gpu_check.md. Exit codes: 0 done, 1 a check failed, 3 no usable GPU here.
set -euo pipefail
cd "$(dirname "$0")/.."
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" scripts/gpu_check.py "$@"
