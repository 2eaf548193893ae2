#!/bin/bash
# A job: the video diffusion transformer under DeepSpeed ZeRO, its tokens sharded by DSP as CONFIG says.
#
#   launch/jobs/deepspeed_video_dsp.sh [MORE ARGUMENTS OF THE SCRIPT]                 on this node
#   launch/jobs/hostfile.sh HOSTS launch/jobs/deepspeed_video_dsp.sh [...]            by a hostfile; likewise slurm.sbatch
#   RDZV=host0:29400 launch/jobs/elastic.sh launch/jobs/deepspeed_video_dsp.sh [...]  by rendezvous
#
# SCRIPT may be any DeepSpeed script that takes --deepspeed_config. DRY_RUN=1 prints the command.
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

START="${START:-torchrun --standalone --nproc-per-node ${GPUS:-8} -m}"
SCRIPT="${SCRIPT:-$launch/examples/train_video_deepspeed.py}"
CONFIG="${CONFIG:-$launch/../configs/deepspeed/video_dsp_zero2.json}"

# shellcheck disable=SC2086  # START is a command with its options, to be split
exec ${DRY_RUN:+echo} $START dsp_plugin.launch "$SCRIPT" --deepspeed_config "$CONFIG" "$@"
