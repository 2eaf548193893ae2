#!/bin/bash
# Starts a job on the hosts of a DeepSpeed hostfile, from one of them, by the deepspeed launcher: pdsh over ssh.
#
#   launch/jobs/hostfile.sh HOSTFILE JOB [ARGUMENTS OF THE JOB]
#
# A line of HOSTFILE is "NAME slots=GPUS". Hosts need ssh without a password and the same folders. MASTER_ADDR is the first
# host's address, by default what `hostname -I` says there. Other hosts get the variables that PASS names and those in
# .deepspeed_env. DEEPSPEED_ARGS are further options of the deepspeed launcher, such as "--include host1@host2:0,1".
# DRY_RUN=1 prints the command.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2; fi

hostfile="$1"
shift
if [ ! -f "$hostfile" ]; then echo "no hostfile at '$hostfile'; its lines are: NAME slots=GPUS" >&2; exit 2; fi
# The jobs of Megatron set it where they run, which here is the first host only.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

environment="$(mktemp)"
trap 'rm -f "$environment"' EXIT
for file in ~/.deepspeed_env .deepspeed_env; do
    if [ -f "$file" ]; then cat "$file"; fi
done > "$environment"
for name in CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS DSP_PLUGIN_CPU DSP_PLUGIN_DEBUG DS_ACCELERATOR ${PASS:-}; do
    if [ -n "${!name:-}" ]; then echo "$name=${!name}"; fi
done >> "$environment"
export DS_ENV_FILE="$environment"

export START="deepspeed --hostfile $hostfile ${MASTER_ADDR:+--master_addr $MASTER_ADDR} \
--master_port ${MASTER_PORT:-29500} --no_local_rank ${DEEPSPEED_ARGS:-} --module"
bash "$@"
