#!/bin/bash
# A job: the video diffusion transformer under DeepSpeed ZeRO, its tokens sharded by DSP as CONFIG says.
#
#   launch/deepspeed_video_dsp.sh [MORE ARGUMENTS OF THE SCRIPT]               on this node
#   launch/hostfile.sh HOSTS launch/deepspeed_video_dsp.sh [...]               elsewhere: hostfile.sh, slurm.sbatch,
#   RDZV=host0:29400 launch/elastic.sh launch/deepspeed_video_dsp.sh [...]     elastic.sh
#
# SCRIPT may be any DeepSpeed script that takes --deepspeed_config. DRY_RUN=1 prints the command.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

START="${START:-torchrun --standalone --nproc-per-node ${GPUS:-8} -m}"
SCRIPT="${SCRIPT:-$here/train_video_deepspeed.py}"
CONFIG="${CONFIG:-$here/../configs/deepspeed/video_dsp_zero2.json}"

# shellcheck disable=SC2086  # START is a command with its options, to be split
exec ${DRY_RUN:+echo} $START dsp_plugin.launch "$SCRIPT" --deepspeed_config "$CONFIG" "$@"
