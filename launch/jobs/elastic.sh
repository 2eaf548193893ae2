#!/bin/bash
# Starts a job on several nodes by torchrun's c10d rendezvous: run it on every node, in any order.
#
#   RDZV=host0:29400 NNODES=2 GPUS=8 launch/jobs/elastic.sh JOB [ARGUMENTS OF THE JOB]
#
# RDZV is a node of the job and a free port there. When a rank dies, all are started again, up to MAX_RESTARTS times; with
# NNODES=MIN:MAX also when a node leaves or joins, on the nodes that are there then. What they continue from is the
# script's last checkpoint. Ranks are numbered by host name, so neighbours stay in a node. DRY_RUN=1 prints the command.
set -euo pipefail
if [ $# -eq 0 ]; then sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2; fi

# Agents that kept one store over restarts would show new ranks the addresses of dead ones (docs/failures.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
: "${RDZV:?name a node of the job and a free port there, such as RDZV=host0:29400}"
export START="torchrun --nnodes ${NNODES:-2} --nproc-per-node ${GPUS:-8} --max-restarts ${MAX_RESTARTS:-3} \
--rdzv-backend c10d --rdzv-endpoint $RDZV --rdzv-id ${RDZV_ID:-dsp-plugin} -m"
exec bash "$@"
