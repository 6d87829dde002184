#!/bin/bash
# Jobs on a real Slurm cluster of two nodes, of which one may crash:
#   tests/slurm/run.sh [case ...]
# ALIGN_SLURM_CLUSTER is a script that manages the cluster: `up 2`, `crash NODE`, `boot NODE`, `in NODE COMMAND...`. Its
# partitions are `main`, which is preempted by requeueing, and `urgent`. ALIGN_SLURM_FOLDER is a folder that all nodes
# see under the same path. It prints one line per case and exits with 1 if one fails. Without Slurm it says so and
# exits with 0. Every case must end with the same numbers as an undisturbed run without Slurm.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
cluster=${ALIGN_SLURM_CLUSTER:-../shared/slurm-test-cluster/setup.sh}
python=$PWD/.venv/bin/python
all_cases=(refused across gpus timelimit preempted requeued crashed killed cancelled stopped two_at_once chain array)
nodes=(node1 node2)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1

skip() { echo "SKIP: $*"; exit 0; }
[[ -x $python ]] || skip "no $python: make install"
[[ -x $cluster ]] || skip "no cluster script $cluster (ALIGN_SLURM_CLUSTER)"
"$cluster" up 2 >/dev/null 2>&1 || skip "$cluster up 2 failed"
timeout 20 sinfo >/dev/null || skip "sinfo does not answer"

folder=$(mktemp -d "${ALIGN_SLURM_FOLDER:-/tmp}/align-slurm-XXXXXX")
echo "in $folder"
"$python" tests/slurm/make_models.py "$folder" >"$folder/make.log" 2>&1 || { cat "$folder/make.log"; exit 1; }

# Make every step of the driver five seconds longer, so that there is time to disturb it.
slow=(env ALIGN_FAULT=role=driver,phase=step,kind=slow,times=1000)

fail() { echo "  $*"; return 1; }

# Submit the recipe; the run is named after the case. NAME [argument ...] -> `job` (the last of a chain)
submit() {
  run=$folder/$1
  shift
  "${prefix[@]}" "$python" launchers/slurm.py "$folder/recipe.yaml" --nodes 2 --gpus-per-node 0 --cpus-per-task 2 \
    --partition main --time 20 --signal-before 60 run.dir="$run" "$@" >"$folder/submit.out" 2>"$folder/submit.err" ||
    return
  job=$(sed -n 's/^job //p' "$folder/submit.out" | sed 's/.* //')
  first_job=$(sed -n 's/^job \([0-9]*\).*/\1/p' "$folder/submit.out")
}

state_of() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1; }
exit_of() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*ExitCode=\([0-9:]*\).*/\1/p' | head -n 1; }
restarts_of() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' | head -n 1; }
steps_of() { cat "$1/metrics.jsonl" 2>/dev/null | wc -l; }

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || { fail "not within its time: $*"; return 1; }
    sleep 0.5
  done
}
has_steps() { (($(steps_of "$1") >= $2)); }
has_ended() { [[ $(state_of "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY)$ ]]; }
has_restarted() { (($(restarts_of "$1") >= $2)); }

ended_as() { # JOB STATE EXIT
  until_true 600 has_ended "$1" || return
  [[ $(state_of "$1") == "$2" && $(exit_of "$1") == "$3" ]] || fail "job $1: $(state_of "$1") $(exit_of "$1"), not $2 $3"
}

same() { # RUN REFERENCE
  local differences
  differences=$("$python" tests/slurm/compare.py "$1" "$2") || fail "$1 is not $2: $differences"
}

# Processes and files of a job that are left on the nodes, and tokens.
leftovers_of() { # JOB
  local node lines
  for node in "${nodes[@]}"; do
    lines=$("$cluster" in "$node" bash -c '
      grep -lzxs "SLURM_JOB_ID=$0" /proc/[0-9]*/environ | while read -r f; do
        tr "\0" " " <"${f%environ}cmdline" | cut -c 1-100; echo; done
      ls -d /tmp/ray/j"$0".* /dev/shm/* 2>/dev/null' "$1")
    [[ $lines ]] && echo "$node: $lines"
  done
  ls "$run"*/launch/token-* 2>/dev/null
}
nothing_left() { [[ -z $(leftovers_of "$1") ]]; }
clean() { # JOB
  until_true 30 nothing_left "$1" || { leftovers_of "$1"; return 1; }
}

reference() { # NAME STEPS: run on one machine, without Slurm
  [[ -e $folder/$1/final ]] && return
  "$python" -m align.cli train "$folder/recipe.yaml" run.dir="$folder/$1" run.steps="$2" cluster.slots_per_core=4 \
    >"$folder/$1.log" 2>&1 || { tail "$folder/$1.log"; return 1; }
}

finish() { # REFERENCE: the job completes with the numbers of this run and leaves nothing
  ended_as "$job" COMPLETED 0:0 && same "$run" "$folder/$1" && clean "$job"
}

# Start a slow run and wait for its third step.
start_slow() { # NAME [argument ...]
  prefix=("${slow[@]}")
  submit "$@" && until_true 400 has_steps "$run" 3
}

case_refused() {
  prefix=()
  local before after
  before=$(squeue -h | wc -l)
  submit refused policy.optimizer.lrr=1
  (($? == 78)) || fail "a wrong key was not refused" || return
  submit refused placement.reward=40
  (($? == 78)) || fail "a placement on slot 40 was not refused" || return
  grep -q "requires 41 slots, the job has 4" "$folder/submit.err" || fail "$(cat "$folder/submit.err")" || return
  after=$(squeue -h | wc -l)
  [[ $before == "$after" && ! -e $run ]] || fail "something was submitted or written"
}

case_across() {
  prefix=()
  # A site that passes no environment to a job, and makes one with a setup file.
  printf 'export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 SITE=here\n' >"$folder/site.sh"
  submit across --export=NONE --setup "$folder/site.sh" --sbatch=--comment="a 'site' of two nodes" &&
    until_true 400 has_steps "$run" 1 || return
  grep -q "policy-0" <(ls "$run/logs") || fail "no log of the policy" || return
  finish ten
}

# Slots that Slurm and Ray count as GPUs. The cluster's GPUs are not real, so the work runs on CPUs.
case_gpus() {
  sinfo -h -o %G | grep -q gpu: || { echo "this cluster counts no GPUs"; return 0; }
  prefix=()
  submit gpus --gpus-per-node 2 && finish ten
}

case_timelimit() {
  reference long 24 || return
  prefix=("${slow[@]}")
  submit timelimit --time 3 run.steps=24 || return
  finish long || return
  (($(restarts_of "$job") >= 1)) || fail "it was never requeued" || return
  grep -q "USR1: asking" "$run/logs/slurm/job-$job.log" || fail "no USR1 came"
}

case_preempted() {
  start_slow preempted || return
  local urgent
  urgent=$(sbatch --parsable --partition urgent --nodes 2 --exclusive --time 2 --output /dev/null --wrap "srun hostname")
  until_true 240 has_restarted "$job" 1 || return
  ended_as "$urgent" COMPLETED 0:0 && finish ten
}

case_requeued() {
  start_slow requeued && scontrol requeue "$job" && until_true 60 has_restarted "$job" 1 && finish ten
}

case_crashed() {
  start_slow crashed && "$cluster" crash node2 || return
  until_true 240 has_restarted "$job" 1
  local restarted=$?
  "$cluster" boot node2 && ((restarted == 0)) && finish ten
}

case_killed() {
  start_slow killed || return
  local driver
  driver=$("$cluster" in node1 pgrep -f -- "^[^ ]*python.* -m align.cli train $run/launch" | head -n 1)
  "$cluster" in node1 kill -KILL "$driver" && until_true 240 has_restarted "$job" 1 && finish ten || return
  (($(wc -l <"$run/launch/faults") == 1)) || fail "faults: $(cat "$run/launch/faults")"
}

case_cancelled() {
  start_slow cancelled && scancel "$job" && until_true 60 has_ended "$job" && clean "$job" || return
  [[ $(state_of "$job") == CANCELLED ]] || fail "job $job: $(state_of "$job")" || return
  prefix=()
  submit cancelled && finish ten # the same command line resumes the run
}

case_stopped() {
  start_slow stopped && touch "$run/STOP" && ended_as "$job" FAILED 75:0 && clean "$job" || return
  (($(restarts_of "$job") == 0)) || fail "it was requeued" || return
  prefix=()
  submit stopped
  (($? == 78)) || fail "a run with a file STOP was submitted"
}

case_two_at_once() {
  prefix=()
  submit first && local first_run=$run one=$job && submit second && local second_run=$run two=$job || return
  ended_as "$one" COMPLETED 0:0 && ended_as "$two" COMPLETED 0:0 || return
  same "$first_run" "$folder/ten" && same "$second_run" "$folder/ten" && clean "$one" && clean "$two" || return
  local overlap
  overlap=$(cat "$first_run/logs/slurm/job-$one.log" "$second_run/logs/slurm/job-$two.log" | sort | head -n 2 |
    grep -c "start on")
  ((overlap == 2)) || fail "the jobs did not overlap"
}

case_chain() {
  start_slow chain --chain 3 && scancel --signal=USR1 --batch "$first_job" && ended_as "$first_job" FAILED 75:0 || return
  finish ten || return
  grep -q "ended before, with status 0" "$run/logs/slurm/job-$job.log" || fail "the third job did not stop at once"
}

case_array() {
  prefix=()
  submit array --array "reward.path=$folder/reward,$folder/nowhere" || return
  local good bad
  good=$(scontrol show job "${job}_0" | sed -n 's/^JobId=\([0-9]*\).*/\1/p')
  bad=$(scontrol show job "${job}_1" | sed -n 's/^JobId=\([0-9]*\).*/\1/p')
  ended_as "$bad" FAILED 78:0 && ended_as "$good" COMPLETED 0:0 && clean "$good" && clean "$bad" || return
  same "$(echo "$run"-0-*)" "$folder/ten"
}

reference ten 10 || { echo "FAIL reference"; exit 1; }
worst=0
for name in "${@:-${all_cases[@]}}"; do
  start=$SECONDS
  prefix=() job='' run=
  if "case_$name" >"$folder/$name.out" 2>&1; then
    echo "PASS $name $((SECONDS - start)) s"
  else
    worst=1
    echo "FAIL $name $((SECONDS - start)) s"
    sed 's/^/  /' "$folder/$name.out" "$folder/submit.err" | tail -n 20
    [[ $job ]] && scancel "$job" ${first_job:+"$first_job"} 2>/dev/null
  fi
done
((worst)) || rm -rf "$folder"
exit "$worst"
