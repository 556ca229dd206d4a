#!/bin/bash
# Trains on several nodes under Slurm, and goes on by itself when the job is requeued:
#
#     sbatch scripts/slurm.sh --config gpt2_124m --parallel.zero 1
#
# One process per node drives all of the node's GPUs. A process per GPU works too (--ntasks-per-node=8: each takes its
# share), but has no use here: a step is one program on all devices, Python only starts it, and one process reads the
# text, compiles and keeps memory once per node instead of eight times.

#SBATCH --job-name=jaxgpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300

# --signal: SIGTERM 300 seconds before the end, for clusters that do not set SLURM_JOB_END_TIME; where it is set the run
# stops by itself in time (--checkpoint.stop-minutes-before-end). Slurm sends it to the tasks, not to this script.
# The folder has to be one that all nodes see: they write their parts of the checkpoints to it.

set -u
cd "${JAXGPT_FOLDER:-${SLURM_SUBMIT_DIR:-.}}" || exit 2

# --wait: where one process has ended the others do so by themselves within a minute; one that hangs is ended then.
srun --wait=90 "${PYTHON:-.venv/bin/python}" run.py "$@" --resume auto
status=$?

# 143: stopped in time and saved (docs/resuming.md), so the same job goes on in the next allocation.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
