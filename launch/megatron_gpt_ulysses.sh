#!/bin/bash
# Megatron-core 0.19, `megatron.training.pretrain`, on GPUs: TP x CP (by Ulysses) x PP, data parallel over the rest.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 TP=4 CP=4 launch/megatron_gpt_ulysses.sh [MORE MEGATRON ARGUMENTS]
#
# Run it on every node. SCRIPT may be any Megatron training script, such as NVIDIA's own pretrain_gpt.py.
# CP ranks are neighbours inside a node as long as TP * CP does not exceed its GPUs.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-29500}"
TP="${TP:-2}"
CP="${CP:-4}"
PP="${PP:-1}"
SCRIPT="${SCRIPT:-$here/pretrain_gpt.py}"
ARGUMENTS="${ARGUMENTS:-$here/../configs/megatron/gpt_7b.args}"
TORCHRUN="${TORCHRUN:-torchrun}"

sequence_parallel=()
if [ "$TP" -gt 1 ]; then sequence_parallel=(--sequence-parallel); fi

# Megatron asks for one hardware queue with TP or CP, so that collectives start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# shellcheck disable=SC2046  # the file holds one flag and its values per line, to be split
exec $TORCHRUN --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m dsp_plugin.launch "$SCRIPT" \
    $(cat "$ARGUMENTS") \
    --tensor-model-parallel-size "$TP" "${sequence_parallel[@]}" --pipeline-model-parallel-size "$PP" \
    --context-parallel-size "$CP" --sp-method ulysses \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    "$@"
