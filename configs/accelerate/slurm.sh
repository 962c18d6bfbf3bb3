#!/bin/bash
# SLURM: a launcher on each machine; the job saves and goes on by itself when it is pre-empted or out of time.
#
#   sbatch configs/accelerate/slurm.sh scripts/train_snn.py --config configs/snn_imagenet.yaml --data.root DIR \
#     --train.batch_size 32 --run.dir runs/mine
#
# from the root of the repository. Options of sbatch in front of the file's name override those below.
#SBATCH --job-name=spikeswap
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# seconds that a launcher leaves its processes for the checkpoint; before PyTorch 2.12 it is 30, whatever is said here
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# srun has not taken the job's --cpus-per-task over since SLURM 22.05: the processes of a machine may share one core
if [ -n "$SLURM_CPUS_PER_TASK" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SPIKESWAP_LAUNCH="--config_file configs/accelerate/several_machines.yaml
    --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
    --main_process_ip $first --main_process_port $((20000 + SLURM_JOB_ID % 10000))"

# a run that was asked to stop says so in here; it is there from the start, as another machine may see a new file late
export SPIKESWAP_STOPPED=$PWD/.stopped-$SLURM_JOB_ID
: >"$SPIKESWAP_STOPPED"

asked=
stop() {
    asked=yes heard=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # to the launchers, not to this script
}
trap stop USR1 TERM

# exec: a shell in between would die of the signal and take the launcher's checkpoint with it. A launcher that fails
# takes the others with it, which might wait for its processes for ever. SLURM_RESTART_COUNT is there from the second
# start on. Before that a job is a new run, as the command is without SLURM: with --resume it would go on with what an
# earlier job of that name has left, or be refused for it. Among the job's own options --resume does that.
# shellcheck disable=SC2016 # the variables are those of each task
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch $SPIKESWAP_LAUNCH --machine_rank "$SLURM_PROCID" "$@"' \
    launcher "$@" ${SLURM_RESTART_COUNT:+--resume} &
step=$!
heard=yes
while [ -n "$heard" ]; do # a signal ends the wait, not the step
    heard=
    wait "$step"
    status=$?
done

# When a pre-emption leaves time (GraceTime), SLURM asks the launchers, not this script. Of that the run's file tells:
# launchers turn its status 75 (distill.interruption.EXIT_PREEMPTED), as every one but 0, into 1.
grep -q . "$SPIKESWAP_STOPPED" && asked=yes
rm -f "$SPIKESWAP_STOPPED"

# a job that was cancelled is COMPLETING by now, as is one that SLURM has queued again by itself: they stay what they are
if [ -n "$asked" ] && [ "$status" -ne 0 ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
