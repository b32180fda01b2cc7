#!/usr/bin/env bash
# Runs a command beside a real Slurm of its own: tests/slurm/start.sh COMMAND...
# One node (this machine), in a temporary folder, with its own key, ports and state; it stops when the command ends, and
# the exit status is the command's. Needs root and Debian's packages slurm-wlm and munge; no systemd, cgroups, database.
# What the node claims to have is made up (memory, two GPUs), so that a profile for large nodes can be tried on a small
# machine; CPUS=n is how many it gives out.
set -euo pipefail

CPUS=${CPUS:-2}
CONF=/etc/slurm/slurm.conf # where srun inside a job looks: the plugin takes SLURM_CONF from its environment

fail() {
    echo "start.sh: $*" >&2
    exit 69
}

[[ $# -gt 0 ]] || fail "say what to run: tests/slurm/start.sh COMMAND..."
for program in slurmctld slurmd munged scontrol srun; do
    PATH=$PATH:/usr/sbin command -v $program > /dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
done
[[ $(id -u) == 0 ]] || fail "root is needed, to start the daemons"
[[ ! -e $CONF && ! -L $CONF ]] || fail "$CONF exists: this machine has a Slurm, or another start.sh is running"

PATH=$PATH:/usr/sbin
folder=$(mktemp -d)
export SLURM_CONF=$folder/slurm.conf # never another Slurm; $CONF is for what loses its environment
node=$(hostname -s)
read -r port_ctld port_node < <(python3 -c '
import socket
pair = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*[each.getsockname()[1] for each in pair])')

daemons=()
stop() {
    scancel --user=root 2> /dev/null || true
    [[ ${#daemons[@]} == 0 ]] || kill "${daemons[@]}" 2> /dev/null || true
    wait
    [[ $(readlink $CONF) != "$folder/slurm.conf" ]] || rm $CONF
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT TERM

cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$port_ctld
SlurmdPort=$port_node
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# Without a database sacct has nothing to say; squeue and scontrol know finished jobs for MinJobAge seconds.
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
MinJobAge=7200
# A job over its memory is killed, as on a cluster with cgroups.
JobAcctGatherParams=OverMemoryKill
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# What stands below is believed, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=512000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES State=UP MaxTime=INFINITE
END
echo "NodeName=$node Name=gpu File=/dev/null,/dev/zero" > "$folder/gres.conf" # a GPU is a file to Slurm
mkdir "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
chmod 755 "$folder"

# In the foreground, so that they are children of this script and end with it.
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munge.seed" 2> "$folder/munged.log" &
daemons+=($!)
mkdir -p "$(dirname $CONF)"
ln -s "$folder/slurm.conf" $CONF
slurmctld -D -f "$folder/slurm.conf" 2> /dev/null &
daemons+=($!)
slurmd -D -f "$folder/slurm.conf" -N "$node" 2> /dev/null &
daemons+=($!)
for _ in {1..150}; do
    [[ $(sinfo --noheader --format=%T 2> /dev/null) != idle ]] || break
    sleep 0.2
done
if [[ $(sinfo --noheader --format=%T 2> /dev/null) != idle ]]; then
    tail -n 20 "$folder"/*.log >&2 || true
    fail "Slurm does not start; its logs are above"
fi

"$@"
