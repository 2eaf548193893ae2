#!/bin/bash
# A job: the video diffusion transformer on Megatron-core; DSP switches the sharded dim over CP ranks, beside TP and PP.
#
#   TP=2 CP=4 launch/jobs/megatron_video_dsp.sh [MORE ARGUMENTS OF THE SCRIPT]       on this node
#   sbatch launch/jobs/slurm.sbatch launch/jobs/megatron_video_dsp.sh [...]          under Slurm; likewise hostfile.sh HOSTS
#   RDZV=host0:29400 launch/jobs/elastic.sh launch/jobs/megatron_video_dsp.sh [...]  by rendezvous
#
# ARGUMENTS is a file of the script's flags, one with its values per line. DRY_RUN=1 prints the command.
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

START="${START:-torchrun --standalone --nproc-per-node ${GPUS:-8} -m}"
TP="${TP:-2}"
CP="${CP:-4}"
PP="${PP:-1}"
SCRIPT="${SCRIPT:-$launch/examples/pretrain_video_core.py}"
ARGUMENTS="${ARGUMENTS:-$launch/../configs/megatron/video_xl.args}"

sequence_parallel=()
if [ "$TP" -gt 1 ]; then sequence_parallel=(--sequence-parallel); fi

# Megatron asks for one hardware queue with TP or CP, so that collectives start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# shellcheck disable=SC2046,SC2086  # START is a command with its options, and the file one flag per line: to be split
exec ${DRY_RUN:+echo} $START dsp_plugin.launch "$SCRIPT" \
    $(cat "$ARGUMENTS") \
    --tensor-model-parallel-size "$TP" "${sequence_parallel[@]}" --pipeline-model-parallel-size "$PP" \
    --context-parallel-size "$CP" --sp-method dsp \
    "$@"
