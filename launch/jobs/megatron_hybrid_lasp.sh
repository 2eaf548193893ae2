#!/bin/bash
# A job: a hybrid of Gated DeltaNet and softmax attention, Megatron-core, whose sequences are sharded over CP ranks.
# Linear layers pass their states (LASP), softmax layers run SOFTMAX.
#
#   TP=2 CP=4 launch/jobs/megatron_hybrid_lasp.sh [MORE MEGATRON ARGUMENTS]            on this node
#   sbatch launch/jobs/slurm.sbatch launch/jobs/megatron_hybrid_lasp.sh [...]          under Slurm; likewise hostfile.sh HOSTS
#   RDZV=host0:29400 launch/jobs/elastic.sh launch/jobs/megatron_hybrid_lasp.sh [...]  by rendezvous
#
# --sp-exchange ring, allgather or scan says how states travel; by default whatever is fastest for their size. Which
# layers are what is in the ARGUMENTS file: --spec and --linear-attention-freq. DRY_RUN=1 prints the command.
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

START="${START:-torchrun --standalone --nproc-per-node ${GPUS:-8} -m}"
TP="${TP:-2}"
CP="${CP:-4}"
PP="${PP:-1}"
SOFTMAX="${SOFTMAX:-lightseq}"
SCRIPT="${SCRIPT:-$launch/examples/pretrain_gpt.py}"
ARGUMENTS="${ARGUMENTS:-$launch/../configs/megatron/hybrid_linear_7b.args}"

sequence_parallel=()
if [ "$TP" -gt 1 ]; then sequence_parallel=(--sequence-parallel); fi

# Megatron asks for one hardware queue with TP or CP, so that collectives start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# shellcheck disable=SC2046,SC2086  # START is a command with its options, and the file one flag per line: to be split
exec ${DRY_RUN:+echo} $START dsp_plugin.launch "$SCRIPT" \
    $(cat "$ARGUMENTS") \
    --tensor-model-parallel-size "$TP" "${sequence_parallel[@]}" --pipeline-model-parallel-size "$PP" \
    --context-parallel-size "$CP" --sp-method lasp --sp-softmax-method "$SOFTMAX" \
    "$@"
