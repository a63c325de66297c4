#!/bin/bash
# Train on the machines of a SLURM job, which is requeued until the run is finished:
#
#     sbatch --nodes=4 config/cluster/slurm.sh train_bayes.py config/train_gpt2.py --out_dir=out/gpt2
#
# Submit it from the repository, in the environment that has torchrun. All machines must see out_dir. Before the time
# limit, and when the job is preempted, the run saves its last step and ends, and the job is requeued. Edit the lines
# below to fit your cluster; a flag of sbatch overrides them.
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK    # srun does not inherit it
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170         # seconds that torchrun gives a run to save; the default is 30
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max_restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:${RDZV_PORT:-29500}" "$@" --init_from=auto &
job=$!

# three minutes before the time limit: srun passes on SIGTERM, the run saves and ends, and the job is requeued
trap 'kill -TERM $job; wait $job; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
wait $job
