#!/bin/bash
# Megatron-core 0.19, `megatron.training.pretrain`, one node of GPUs: a hybrid of Gated DeltaNet and softmax attention
# whose sequences are sharded over CP ranks. Linear layers pass their states (LASP), softmax layers run SOFTMAX.
#
#   TP=2 CP=4 launch/megatron_hybrid_lasp.sh [MORE MEGATRON ARGUMENTS]
#
# --sp-exchange ring, allgather or scan says how states travel; by default whatever is fastest for their size. Which
# layers are softmax attention is --linear-attention-freq in the ARGUMENTS file.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

GPUS="${GPUS:-8}"
TP="${TP:-2}"
CP="${CP:-4}"
PP="${PP:-1}"
SOFTMAX="${SOFTMAX:-lightseq}"
SPEC="${SPEC:-dsp_plugin.patches.megatron.linear_specs gated_delta_gpt}"
SCRIPT="${SCRIPT:-$here/pretrain_gpt.py}"
ARGUMENTS="${ARGUMENTS:-$here/../configs/megatron/hybrid_linear_7b.args}"
TORCHRUN="${TORCHRUN:-torchrun}"

sequence_parallel=()
if [ "$TP" -gt 1 ]; then sequence_parallel=(--sequence-parallel); fi

# Megatron asks for one hardware queue with TP or CP, so that collectives start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# shellcheck disable=SC2046,SC2086  # the file holds one flag and its values per line, to be split, as SPEC is
exec $TORCHRUN --standalone --nproc-per-node "$GPUS" -m dsp_plugin.launch "$SCRIPT" \
    $(cat "$ARGUMENTS") --spec $SPEC \
    --tensor-model-parallel-size "$TP" "${sequence_parallel[@]}" --pipeline-model-parallel-size "$PP" \
    --context-parallel-size "$CP" --sp-method lasp --sp-softmax-method "$SOFTMAX" \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    "$@"
