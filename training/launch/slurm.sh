#!/bin/bash
# A run on several nodes that survives preemption and time limits: before the end SLURM sends SIGTERM, the run saves a
# checkpoint after its current step (an evaluation that is under way is finished first), and the job is queued again.
#   sbatch --nodes 2 --gpus-per-node 8 training/launch/slurm.sh \
#       -m training.pretrain --config training/recipes/pretrain/imagenet1k/locatvit_base.yaml --output_dir SHARED/RUN
# Another way of sharing the work: sbatch --export ALL,LAUNCH=training/launch/fsdp2.yaml ...
#SBATCH --job-name=locatvit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
LAUNCH=${LAUNCH:-training/launch/several_nodes.yaml}
GPUS=${SLURM_GPUS_ON_NODE:-8}
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 # seconds that a checkpoint may take before the processes are killed
export OMP_NUM_THREADS=1
# Since version 22.05 srun does not take over --cpus-per-task of the job: it would give the launcher one CPU.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# One launcher a node. \$SLURM_NODEID is known only where it runs.
srun --kill-on-bad-exit=1 bash -c "exec accelerate launch --config_file $LAUNCH \
    --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * GPUS)) --machine_rank \$SLURM_NODEID \
    --main_process_ip \$MAIN_ADDRESS --main_process_port \$MAIN_PORT $(printf '%q ' "$@")"
status=$?

# An interrupted run says so in its folder, which the command line names; a finished or a failed one does not, and is not queued again.
output=$(printf '%s\n' "$@" | sed -n '/^--output[_-]dir$/{n;p}; s/^--output[_-]dir=//p')
if [ -f "$output/interrupted" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
