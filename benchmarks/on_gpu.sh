#!/usr/bin/env bash
# Proof and measurement on a machine with an NVIDIA GPU, in parts of less than ten minutes; see benchmarks/README.md.
#
#   benchmarks/on_gpu.sh --list
#   benchmarks/on_gpu.sh PART [RESULTS_FOLDER] [--again] [--within SECONDS] [--rehearse]
#
# PYTHON is the interpreter to use, one that has torch; default python3.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/on_gpu.py" "$@"
