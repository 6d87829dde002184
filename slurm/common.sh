#!/bin/bash
# Functions of the jobs in this folder. A job sources this file; a step on a node runs one function of it:
#   srun ... bash common.sh FUNCTION ARGUMENT...
# Values travel as arguments, never inside a command line that a shell reads again.

log() { echo "$(date +%FT%T) [${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}] $*"; }

# An IPv4 address of this machine that other machines reach: that of its name (argument 1), else its first one.
ip_of() {
  { getent ahostsv4 "$1"; getent ahostsv4 "$(hostname)"; hostname -I | tr ' ' '\n'; } 2>/dev/null |
    awk '$1 ~ /^[0-9]+(\.[0-9]+)+$/ && $1 !~ /^127\./ {print $1; exit}'
}

# The network interface that has an address; nothing where `ip` cannot tell.
interface_of() {
  ip -o -4 addr show to "$1" 2>/dev/null | awk '{print $2; exit}'
}

listens() { # ADDRESS PORT
  (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# A port for Ray's head on this machine (its address is argument 1). Jobs that run at the same time and restarts of a
# job begin to look at different numbers; one that something listens on is passed over. 20000 to 31999 lie below the
# ports that Linux picks by itself.
port_for() {
  local try port
  for ((try = 0; try < 1200; try++)); do
    port=$((20000 + ((SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0} + try) % 1200) * 10))
    listens "$1" "$port" || { echo "$port"; return; }
  done
  return 1
}

# A folder of our own below the one that all users share; Ray opens what it makes itself to everybody.
own_folder() {
  mkdir -m 1777 "$(dirname "$1")" 2>/dev/null
  [[ -O $1 && ! -L $1 ]] && rm -rf "$1" # left by a machine that went down
  mkdir -m 700 "$1"
}

# Bytes of Ray's object store: three tenths of the job's memory on this node, as Ray takes by itself of all of it, but
# not more than half of what is free in /dev/shm, beyond which Ray would leave it for a disk.
object_store_bytes() {
  local memory shared
  memory=$(awk '/^MemTotal:/ {printf "%.0f", $2 * 1024}' /proc/meminfo)
  ((${SLURM_MEM_PER_NODE:-0})) && ((SLURM_MEM_PER_NODE * 1048576 < memory)) && memory=$((SLURM_MEM_PER_NODE * 1048576))
  shared=$(df --output=avail --block-size=1 /dev/shm | tail -n 1)
  echo $((memory * 3 / 10 < shared / 2 ? memory * 3 / 10 : shared / 2))
}

# Until Ray answers. In the background, because a trap only runs when a command is over or while `wait` waits.
wait_for_ray() { # ADDRESS:PORT PYTHON SECONDS
  local end=$((SECONDS + $3))
  until listens "${1%:*}" "${1##*:}"; do
    ((SECONDS < end)) || { echo "nothing listens on $1 after $3 s"; return 76; }
    sleep 0.5
  done
  until timeout 30 "$2" -P -m ray.scripts.scripts health-check --address "$1" >/dev/null 2>&1 & wait $!; do
    ((SECONDS < end)) || { echo "Ray on $1 is not healthy after $3 s"; return 76; }
    sleep 0.5
  done
}

# Step: Ray on one node until it ends, then nothing of the step is left.
# TEMP PYTHON ADDRESS:PORT SECONDS ARGUMENT... ; ADDRESS:PORT is "head" on the head, which gets its port as an argument
ray_node() {
  local temp=$1 python=$2 address=$3 seconds=$4 own pid=
  shift 4
  # Ray takes half a minute to leave on SIGTERM, and what comes from Slurm leaves less. There is nothing to lose.
  trap '[[ $pid ]] || { rm -rf "$temp"; exit 143; }; kill -KILL "$pid" 2>/dev/null' TERM
  trap '' USR1 USR2
  reap earlier
  rm -rf "${temp%.*}".*
  own_folder "$temp" || { echo "$temp belongs to somebody else"; return 1; }
  own=$(ip_of "${SLURMD_NODENAME:-}")
  # Collective operations over sockets listen on the address of the host's name, which may be a loopback address.
  GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$(interface_of "$own")}
  if [[ $GLOO_SOCKET_IFNAME ]]; then export GLOO_SOCKET_IFNAME; else unset GLOO_SOCKET_IFNAME; fi
  if [[ $address == head ]]; then
    set -- --head --temp-dir="$temp/r" --include-dashboard=false "$@"
  else
    wait_for_ray "$address" "$python" "$seconds" || return
    set -- --address="$address" "$@"
  fi
  "$python" -P -m ray.scripts.scripts start --block --node-ip-address="$own" --disable-usage-stats \
    --object-store-memory="$(object_store_bytes)" --min-worker-port=0 --max-worker-port=0 "$@" &
  pid=$!
  wait_until_gone "$pid"
  local status=$?
  reap step
  rm -rf "$temp"
  return "$status"
}

# Step: the driver, when Ray answers.
drive() { # ADDRESS:PORT PYTHON SECONDS ARGUMENT...
  local address=$1 python=$2 seconds=$3
  shift 3
  wait_for_ray "$address" "$python" "$seconds" || return
  exec "$python" -m align.cli "$@" # in the folder of the code: the first place where Python, and Ray's workers, look
}

# Step: the reward model as a service.
serve() { # PYTHON CONFIG
  exec "$1" -m align.cli serve reward "$2"
}

# `wait` comes back when a trap has run: wait again.
wait_until_gone() {
  local status
  while :; do
    wait "$1"
    status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# Set `pids`: processes of this job on this machine that carry a step's number; the job script and srun carry none.
#   step     those of this step          job      those of all other steps
#   earlier  those of the job before it was requeued
find_processes() {
  local file files
  mapfile -t files < <(grep -lzxs -- "SLURM_JOB_ID=$SLURM_JOB_ID" /proc/[0-9]*/environ)
  pids=()
  for file in "${files[@]}"; do
    grep -qzs '^SLURM_STEP_ID=' "$file" || continue
    case $1 in
      step) grep -qzxs "SLURM_STEP_ID=$SLURM_STEP_ID" "$file" || continue ;;
      job) ! grep -qzxs "SLURM_STEP_ID=$SLURM_STEP_ID" "$file" || continue ;;
      earlier) ! grep -qzxs "SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}" "$file" || continue ;;
    esac
    file=${file#/proc/} file=${file%/environ}
    [[ $file == "$$" ]] || pids+=("$file")
  done
}

# End what `find_processes` names, by the job's number, never by name. At once: what has state has saved it by then, and
# between SIGTERM and the end of this script Slurm may leave a few seconds.
reap() { # SCOPE
  [[ $1 == earlier && -z ${SLURM_RESTART_COUNT:-} ]] && return
  local try pid
  find_processes "$1"
  for pid in "${pids[@]}"; do
    kill -KILL "$pid" 2>/dev/null && echo "$(hostname): killed $pid $(cat "/proc/$pid/comm" 2>/dev/null)"
  done
  for ((try = 0; try < 50; try++)); do
    any_lives "${pids[@]}" || break
    sleep 0.1
  done
}

any_lives() { # PID...
  local pid
  for pid in "$@"; do
    [[ $(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null) =~ ^[^Z]$ ]] && return
  done
  return 1
}

# Step: the end of a job on one node.
sweep() { # TEMP
  reap job
  rm -rf "$1"
}

# Run a step on every node of the job at the end, where Slurm still lets us; else only here.
everywhere() { # FUNCTION ARGUMENT...
  timeout --kill-after=5 30 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 bash "$common" "$@" || SLURM_STEP_ID=batch bash "$common" "$@"
}

# Whether Slurm has told this job to make room. Of that only the steps may hear.
preempted() {
  scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

# Put the job back into the queue, unless Slurm has decided already: after scancel, scontrol requeue and node failure
# it is no longer RUNNING.
requeue() {
  local state
  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null | head -n 1)
  log "requeue: the job is ${state:-unknown to Slurm}, restarts so far ${SLURM_RESTART_COUNT:-0} of $max_restarts"
  if [[ $state == RUNNING ]] && ((${SLURM_RESTART_COUNT:-0} < max_restarts)); then
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # Slurm ends this script; until then it must not leave by itself
  fi
}

# The arguments of a job script after LAUNCH and PYTHON: options of srun, then -- and a command before each step's own.
read_step_arguments() {
  step_options=() step_command=()
  for ((; $#; )); do
    [[ $1 == -- ]] && { step_command=("${@:2}"); return; }
    step_options+=("$1")
    shift
  done
}

# What the site needs before anything runs: modules, conda, variables. Its own arguments must not reach it.
load_setup() {
  local file=$1
  shift
  . "$file"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  setup=${0%/code/slurm/common.sh}/setup.sh
  if [[ $1 != sweep && -e $setup ]]; then
    load_setup "$setup" || { echo "$setup ended with status $?"; exit 78; }
  fi
  "$@"
fi
