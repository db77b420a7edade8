#!/usr/bin/env bash
# Local test cluster: simulates several hosts on this machine. Each has its own network, host name and sshd. A bridge
# connects them.
#
#   launch/testhosts.sh up 3 [--rate 100mbit]    creates h1, h2 and h3; each reaches the others by name and by ssh
#   launch/testhosts.sh run h1 command...        runs a command on h1, in this directory
#   launch/testhosts.sh cut h2                   disconnects h2's cable; `mend h2` reconnects it; also from a host
#   launch/testhosts.sh halt h2                  kills all processes on h2, with its sshd; `boot h2` starts sshd again
#   launch/testhosts.sh down                     ends all processes on the hosts, and removes the hosts and their files
#
# The hosts share this machine's files, users and processes; only network and host name differ. You need root. The
# script does not change this machine's ssh configuration: it creates new keys and known hosts in /etc/netns/, which
# `ip netns exec` mounts over /etc/. Set HVDKIT_TESTHOSTS to a name to create another set of hosts.
set -euo pipefail

name=${HVDKIT_TESTHOSTS:-hvdkit}
state=/run/hvdkit-testhosts/$name
network=10.77.0  # not reachable from outside: the bridge has no address and no uplink

die() { printf 'testhosts.sh: %s\n' "$*" >&2; exit 2; }

check_machine() {
  [[ $EUID == 0 ]] || die "root is needed to make network namespaces; run it with sudo"
  [[ $name =~ ^[a-z0-9]{1,10}$ ]] || die "HVDKIT_TESTHOSTS=$name is not a name of 1 to 10 lower-case letters and digits"
  local command missing=()
  for command in ip:iproute2 tc:iproute2 sshd:openssh-server ssh:openssh-client nsenter:util-linux; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${command%:*}" >/dev/null || missing+=("${command#*:}")
  done
  [[ ! ${missing[*]-} ]] || die "commands are missing; install them with: apt-get install ${missing[*]}"
}

up() {
  local count=${1:-} rate='' i failed
  [[ $count =~ ^[1-9][0-9]?$ ]] || die "'up' needs a number of hosts from 1 to 99, as in: up 2"
  shift
  if (($#)); then
    [[ $1 == --rate && ${2:-} && $# == 2 ]] || die "'$*' is not understood; expected --rate RATE, as in --rate 100mbit"
    rate=$2
  fi
  down
  trap 'failed=$?; ((failed == 0)) || down; exit "$failed"' EXIT  # remove a partly created cluster
  mkdir -p "$state" /run/sshd
  chmod 700 "$state"
  ssh-keygen -q -t ed25519 -N '' -C "$name" -f "$state/key"
  touch "$state/network"
  mount --bind /proc/self/ns/net "$state/network"  # lets commands on the hosts change this machine's end of a cable
  ip link add "$name" type bridge
  ip link set "$name" up
  for ((i = 1; i <= count; i++)); do make_files "$i" "$count"; done
  for ((i = 1; i <= count; i++)); do make_host "$i" "$rate"; done
  echo "h1 to h$count are up: $0 run h1 ssh h$count hostname"
}

make_files() {  # HOST COUNT: the files that the host sees in place of those in /etc
  local etc=/etc/netns/$name-h$1 i
  mkdir -p "$etc/ssh"
  ssh-keygen -q -t ed25519 -N '' -C "h$1" -f "$etc/ssh/ssh_host_ed25519_key"
  printf '127.0.0.1 localhost\n' >"$etc/hosts"
  for ((i = 1; i <= $2; i++)); do
    printf '%s.%d h%d\n' "$network" "$i" "$i" >>"$etc/hosts"
    printf 'h%d,%s.%d %s\n' "$1" "$network" "$1" "$(cat "$etc/ssh/ssh_host_ed25519_key.pub")" \
      >>"/etc/netns/$name-h$i.known"
  done
  cat >"$etc/ssh/ssh_config" <<END
Host *
  IdentityFile $state/key
  IdentitiesOnly yes
  UserKnownHostsFile /etc/ssh/ssh_known_hosts
END
  cat >"$etc/ssh/sshd_config" <<END
ListenAddress $network.$1
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile $state/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
PidFile $state/h$1.pid
END
}

make_host() {  # HOST RATE
  local host=h$1 space=$name-h$1
  mv "/etc/netns/$space.known" "/etc/netns/$space/ssh/ssh_known_hosts"
  ip netns add "$space"
  ip link add "$space" type veth peer name eth0 netns "$space"
  ip link set "$space" master "$name" up
  ip -n "$space" address add "$network.$1/24" dev eth0
  ip -n "$space" link set lo up
  ip -n "$space" link set eth0 up
  if [[ $2 ]]; then  # limit both directions
    tc qdisc add dev "$space" root tbf rate "$2" burst 128kb latency 400ms
    tc -n "$space" qdisc add dev eth0 root tbf rate "$2" burst 128kb latency 400ms
  fi
  boot "$host"
}

boot() {  # HOST
  local host=${1:-} space=$name-${1:-}
  [[ -d /etc/netns/$space ]] || die "there is no host '$host'; make hosts with: $0 up 2"
  [[ ! -e $state/$host.pid ]] || die "$host is up; to end what runs on it: $0 halt $host"
  # sshd keeps the host's name as long as it runs; `run` enters sshd's namespaces, and ssh sessions inherit them.
  # shellcheck disable=SC2016  # the inner shell expands it
  ip netns exec "$space" unshare --uts bash -c 'hostname "$1" && exec "$(PATH=$PATH:/usr/sbin command -v sshd)" -f /etc/ssh/sshd_config' - "$host"
  for _ in {1..100}; do [[ -s $state/$host.pid ]] && return; sleep 0.05; done
  die "sshd did not start on $host; try: ip netns exec $space $(PATH=$PATH:/usr/sbin command -v sshd) -d"
}

run() {
  local host=${1:-} pid
  pid=$(cat "$state/$host.pid" 2>/dev/null) || die "there is no host '$host'; make hosts with: $0 up 2"
  shift
  (($#)) || die "no command was given, as in: $0 run $host hostname"
  # shellcheck disable=SC2016  # the inner shell expands it
  exec nsenter --target "$pid" --net --uts --mount sh -c 'cd "$1" && shift && exec "$@"' - "$PWD" "$@"
}

halt() {  # HOST
  local pid
  [[ -e $state/${1:-}.pid ]] || die "there is no host '${1:-}'; make hosts with: $0 up 2"
  for pid in $(ip netns pids "$name-$1"); do kill -9 "$pid" 2>/dev/null || true; done
  rm "$state/$1.pid"
}

cable() {  # up|down HOST
  [[ -e $state/${2:-}.pid ]] || die "there is no host '${2:-}'; make hosts with: $0 up 2"
  nsenter --net="$state/network" ip link set "$name-$2" "$1"  # the other end of the cable
}

down() {
  local space pid
  for space in $(ip netns list | awk -v name="$name-h" 'index($1, name) == 1 { print $1 }'); do
    for pid in $(ip netns pids "$space"); do kill -9 "$pid" 2>/dev/null || true; done
    ip netns delete "$space"
    ip link delete "$space" 2>/dev/null || true  # the kernel removes it with the namespace, slightly later
  done
  ip link delete "$name" 2>/dev/null || true
  umount "$state/network" 2>/dev/null || true
  rm -rf "$state" /etc/netns/"$name"-h*
  rmdir /etc/netns /run/hvdkit-testhosts 2>/dev/null || true
}

check_machine
PATH=$PATH:/usr/sbin:/sbin
case ${1:-} in
  up)   shift; up "$@" ;;
  run)  shift; run "$@" ;;
  cut)  shift; cable down "$@" ;;
  mend) shift; cable up "$@" ;;
  halt) shift; halt "$@" ;;
  boot) shift; boot "$@" ;;
  down) down ;;
  *)    die "'${1:-}' is not understood; expected up N [--rate RATE], run HOST COMMAND..., cut HOST, mend HOST, halt HOST, boot HOST or down" ;;
esac
