#!/bin/bash
# Functions of the jobs in this folder. A job script sources this file; a step on a node runs one function:
#   srun ... bash common.sh FUNCTION ARGUMENT...
# Values are passed as arguments, never inside a command line that a shell parses again.

log() { echo "$(date +%FT%T) [${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}] $*"; }

# An IPv4 address of this machine that other machines can reach: that of its name (argument 1), else its first.
ip_of() {
  { getent ahostsv4 "$1"; getent ahostsv4 "$(hostname)"; hostname -I | tr ' ' '\n'; } 2>/dev/null |
    awk '$1 ~ /^[0-9]+(\.[0-9]+)+$/ && $1 !~ /^127\./ {print $1; exit}'
}

# The network interface of an address; empty if `ip` does not know it.
interface_of() {
  ip -o -4 addr show to "$1" 2>/dev/null | awk '{print $2; exit}'
}

tcp_open() { # ADDRESS PORT
  (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# A free port for Ray's head on this machine (address: argument 1). Concurrent jobs and restarts of a job start their
# search at different numbers. The range 20000 to 31999 is below the ports that Linux assigns to connections.
port_for() {
  local try port
  for ((try = 0; try < 1200; try++)); do
    port=$((20000 + ((SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0} + try) % 1200) * 10))
    tcp_open "$1" "$port" || { echo "$port"; return; }
  done
  return 1
}

# Make a private folder below one that all users share. Ray makes its own folders readable for everybody.
make_private_folder() {
  mkdir -m 1777 "$(dirname "$1")" 2>/dev/null
  [[ -O $1 && ! -L $1 ]] && rm -rf "$1" # left from before a crash of the machine
  mkdir -m 700 "$1"
}

# Size of Ray's object store in bytes: 30 % of the job's memory on this node (Ray's default is 30 % of all memory), but
# at most half of the free space in /dev/shm, because Ray falls back to a disk when /dev/shm is too small.
object_store_bytes() {
  local memory shared
  memory=$(awk '/^MemTotal:/ {printf "%.0f", $2 * 1024}' /proc/meminfo)
  ((${SLURM_MEM_PER_NODE:-0})) && ((SLURM_MEM_PER_NODE * 1048576 < memory)) && memory=$((SLURM_MEM_PER_NODE * 1048576))
  shared=$(df --output=avail --block-size=1 /dev/shm | tail -n 1)
  echo $((memory * 3 / 10 < shared / 2 ? memory * 3 / 10 : shared / 2))
}

# Wait until Ray answers. The check runs in the background, because a trap only runs between commands or during `wait`.
wait_for_ray() { # ADDRESS:PORT PYTHON SECONDS
  local end=$((SECONDS + $3))
  until tcp_open "${1%:*}" "${1##*:}"; do
    ((SECONDS < end)) || { echo "nothing listens on $1 after $3 s"; return 76; }
    sleep 0.5
  done
  until timeout 30 "$2" -P -m ray.scripts.scripts health-check --address "$1" >/dev/null 2>&1 & wait $!; do
    ((SECONDS < end)) || { echo "Ray on $1 is not healthy after $3 s"; return 76; }
    sleep 0.5
  done
}

# Step: run Ray on one node until it ends, then remove everything of the step.
# TEMP PYTHON ADDRESS:PORT SECONDS ARGUMENT... ; on the head, ADDRESS:PORT is "head", and its port is an argument
ray_node() {
  local temp=$1 python=$2 address=$3 seconds=$4 own pid=
  shift 4
  # Ray takes 30 s to end after SIGTERM, and Slurm gives less. Ray has no state to save, so kill it.
  trap '[[ $pid ]] || { rm -rf "$temp"; exit 143; }; kill -KILL "$pid" 2>/dev/null' TERM
  trap '' USR1 USR2
  kill_processes earlier
  rm -rf "${temp%.*}".*
  make_private_folder "$temp" || { echo "$temp belongs to another user"; return 1; }
  own=$(ip_of "${SLURMD_NODENAME:-}")
  # gloo listens on the address of the host's name by default, which may be a loopback address.
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
  kill_processes step
  rm -rf "$temp"
  return "$status"
}

# Step: run the driver as soon as Ray answers.
run_driver() { # ADDRESS:PORT PYTHON SECONDS ARGUMENT...
  local address=$1 python=$2 seconds=$3
  shift 3
  wait_for_ray "$address" "$python" "$seconds" || return
  exec "$python" -m align.cli "$@" # started in the folder of the code, where Python and Ray's workers look first
}

# Step: run the reward service.
serve() { # PYTHON CONFIG
  exec "$1" -m align.cli serve reward "$2"
}

# Wait for a process. `wait` also returns after a trap, so repeat it.
wait_until_gone() {
  local status
  while :; do
    wait "$1"
    status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# Set `pids` to processes of this job's steps on this machine (the job script and srun have no step number):
#   step     processes of this step
#   job      processes of all other steps
#   earlier  processes from before the job was requeued
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

# Kill the processes that `find_processes` finds by job number, never by name. SIGKILL, because state is saved by then,
# and Slurm may leave only seconds between SIGTERM and the end of this script.
kill_processes() { # SCOPE
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

# Step: clean up one node at the end of a job.
clean_node() { # TEMP
  kill_processes job
  rm -rf "$1"
}

# Run a step on every node at the end of the job; only on this node if Slurm refuses.
on_all_nodes() { # FUNCTION ARGUMENT...
  timeout --kill-after=5 30 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 bash "$common" "$@" || SLURM_STEP_ID=batch bash "$common" "$@"
}

# Whether this job is being preempted. Slurm may signal that to the steps only.
preempted() {
  scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

# Requeue the job if it is still RUNNING. It is not after scancel, scontrol requeue or a node failure.
requeue() {
  local state
  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null | head -n 1)
  log "requeue: the job is ${state:-unknown to Slurm}, restarts so far ${SLURM_RESTART_COUNT:-0} of $max_restarts"
  if [[ $state == RUNNING ]] && ((${SLURM_RESTART_COUNT:-0} < max_restarts)); then
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this script, which must not exit before
  fi
}

# Parse a job script's arguments after LAUNCH and PYTHON: options of srun, then -- and a prefix of each step's command.
read_step_arguments() {
  step_options=() step_command=()
  for ((; $#; )); do
    [[ $1 == -- ]] && { step_command=("${@:2}"); return; }
    step_options+=("$1")
    shift
  done
}

# Source the site's setup file: modules, conda, variables. It must not see the arguments of this script.
load_setup() {
  local file=$1
  shift
  . "$file"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  setup=${0%/code/slurm/common.sh}/setup.sh
  if [[ $1 != clean_node && -e $setup ]]; then
    load_setup "$setup" || { echo "$setup ended with status $?"; exit 78; }
  fi
  "$@"
fi
