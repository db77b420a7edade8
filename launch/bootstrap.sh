#!/usr/bin/env bash
# Makes an environment that runs hvdkit: TensorFlow, Keras, hvdkit, and Horovod compiled against that TensorFlow.
#
#   launch/bootstrap.sh                  makes .venv in this checkout, with the versions of requirements.txt
#   launch/bootstrap.sh --into PREFIX    sets up a venv or conda environment that is there already; if it has its own
#                                        TensorFlow (2.16 to 2.21), that, its Keras and its NumPy stay as they are
#   --gpu auto|yes|no    NCCL in Horovod: auto (default) where both nvcc and an NVIDIA driver are there; yes builds it
#                        without a driver too, for an image
#   --mpi auto|yes|no    MPI in Horovod: auto (default) where mpicxx is there. Gloo is always built in.
#   --help               prints this
#
# auto decides once. An environment that is set up keeps its Horovod when compilers, MPI or a GPU driver come or go; the
# script then says what could be built in, and by which command. yes and no change the build, and are remembered.
#
# PYTHON=...           the Python for .venv (3.11 to 3.13); default: python3, or the newest python3.N that fits
# HVDKIT_CACHE=...     where built Horovod wheels are kept; default: ~/.cache/hvdkit
# HVDKIT_NO_APT=1      only name a missing system package, also where this could install it (as root, with apt-get)
# CXX, CXXFLAGS, CUDA_HOME, MAKEFLAGS and TMPDIR mean what they always mean.
#
# The first run takes about five minutes, the next ones under 3 s. An interrupted run is carried on by the next one.
# Exit code: 0 ready; 1 a step failed, and its log is shown; 2 something is wrong that one sentence tells how to mend.

set -euo pipefail

readonly VERSION=0.28.1  # of Horovod
readonly SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly CACHE=${HVDKIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdkit}/horovod

mode=venv prefix=$ROOT/.venv gpu=auto mpi=auto       # what was asked for
here_mpicxx='' here_nvcc='' driver=no                # what this machine has: detect()
engines=gloo nccl=no mpicxx='' nvcc='' cxx='' cuda=no  # what to build: decide()
python='' py='' tf_dist='' tf_version='' tf_size=''  # what the environment has: find_python(), read_environment()
declined='' pins='' wheel=''                         # what the note keeps: write_note()
own_tf=no inputs='' entry='' tmp='' log=/dev/null job=''

say() { printf '%s\n' "$*"; }
die() { printf 'bootstrap.sh: %s\n' "$*" >&2; exit 2; }

# -------------------------------------------------------------------------------------------------- what was asked for

parse_arguments() {
  while (($#)); do
    case $1 in
      --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
      --into | --gpu | --mpi)
        [[ ${2:-} ]] || die "$1 was given nothing, and expects a value; see --help"
        case $1 in --into) mode=into prefix=$2 ;; --gpu) gpu=$2 ;; --mpi) mpi=$2 ;; esac
        shift 2 ;;
      *) die "there is no option '$1'; the options are --into PREFIX, --gpu, --mpi and --help" ;;
    esac
  done
  [[ $gpu =~ ^(auto|yes|no)$ ]] || die "--gpu was given '$gpu', and expects auto, yes or no, as in --gpu no"
  [[ $mpi =~ ^(auto|yes|no)$ ]] || die "--mpi was given '$mpi', and expects auto, yes or no, as in --mpi no"
}

check_prefix() {
  if [[ $mode == into ]]; then
    [[ -x $prefix/bin/python && (-e $prefix/pyvenv.cfg || -d $prefix/conda-meta) ]] ||
      die "--into was given '$prefix', and expects a venv or conda environment (bin/python with pyvenv.cfg or" \
        "conda-meta); make one with: python3 -m venv '$prefix'"
    prefix=$(cd "$prefix" && pwd)
    PATH=$prefix/bin:$PATH  # a conda environment may bring its own mpicxx, nvcc, cmake and compiler
  elif [[ -d $prefix && ! -e $prefix/pyvenv.cfg && $(ls -A "$prefix") != @(|bootstrap.log) ]]; then
    die "$prefix is there and is no venv (it has no pyvenv.cfg); move it away, or name an environment with --into"
  fi
}

# The driver is looked for by its device node. nvidia-smi takes seconds where there are many GPUs, and a second run must
# not; /proc/driver/nvidia also shows in containers that were given no GPU. /dev/dxg is the node on WSL.
detect() {
  PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH
  here_nvcc=$(command -v nvcc) || here_nvcc=''
  here_mpicxx=$(command -v mpicxx) || here_mpicxx=''
  if [[ -e /dev/nvidiactl || -e /dev/dxg ]]; then driver=yes; fi
  [[ $gpu != yes || $here_nvcc ]] ||
    die "--gpu yes needs nvcc, the CUDA compiler, and it is neither on PATH nor in CUDA_HOME/bin; install a CUDA" \
      "toolkit of version 12 or newer (Debian/Ubuntu: nvidia-cuda-toolkit), or say --gpu no"
}

recorded() {  # WORD: prints the rest of the line that starts with WORD in the note that an earlier run left
  if [[ -e $prefix/.hvdkit-bootstrap ]]; then sed -n "s/^$1 //p" "$prefix/.hvdkit-bootstrap"; fi
}

# What to build. What no option decides stays as it was built, so that a system package that comes or goes starts no
# build that nobody asked for. Without an earlier build, it is what this machine has.
decide() {
  local built was_declined='' was_mpicxx=$here_mpicxx was_nvcc='' was_cxx=''
  if [[ $driver == yes ]]; then was_nvcc=$here_nvcc; fi
  cuda=$driver
  built=$(recorded built)
  if [[ $built ]]; then
    IFS='|' read -r was_declined was_mpicxx was_nvcc was_cxx <<<"$built"
    cuda=no
    if compgen -G "$prefix/lib/python3.*/site-packages/nvidia/cudnn" >/dev/null; then cuda=yes; fi
    if [[ $was_mpicxx && ! -x $was_mpicxx ]] && mpi_has_gone; then was_mpicxx=$here_mpicxx; fi
  fi
  case $mpi in auto) mpicxx=$was_mpicxx ;; yes) mpicxx=$here_mpicxx ;; no) mpicxx='' ;; esac
  case $gpu in auto) nvcc=$was_nvcc ;; yes) nvcc=$here_nvcc cuda=yes ;; no) nvcc='' cuda=no ;; esac
  cxx=${CXX:-$was_cxx}
  declined=
  if [[ $mpi == no || ($mpi == auto && $was_declined == *mpi*) ]]; then declined+=mpi; fi
  if [[ $gpu == no || ($gpu == auto && $was_declined == *gpu*) ]]; then declined+=gpu; fi
  name_engines
}

name_engines() {
  nccl=no engines=gloo${mpicxx:++mpi}
  if [[ $nvcc ]]; then nccl=yes engines+=+nccl; fi
}

use_compiler() {  # the one of the earlier build, unless CXX says otherwise or it has gone
  if [[ ! ${CXX:-} && $cxx ]] && command -v "$cxx" >/dev/null; then export CXX=$cxx; fi
  cxx=${CXX:-}
}

mpi_has_gone() {  # with the library that Horovod is linked against: without the compiler alone Horovod still loads
  ldd "$prefix"/lib/python3.*/site-packages/horovod/tensorflow/mpi_lib.*.so 2>/dev/null | grep -q 'libmpi.*not found'
}

# What goes in, as one hash, taken once: a file that is edited during the run is then seen by the next. With --into
# hvdkit is installed as a copy, so its sources count; in .venv it is editable.
hash_inputs() {
  inputs=$({
    say "$mode"
    cat "${BASH_SOURCE[0]}" "$ROOT/requirements.txt" "$ROOT/pyproject.toml" "$ROOT"/hvdkit/native/*.{cc,h}
    if [[ $mode == into ]]; then find "$ROOT/hvdkit" "$ROOT/models" -name '*.py' -print0 | sort -z | xargs -0 cat; fi
  } | sha256sum)
}

# No Python is started for this, so that a second run is quick: the names of the dist-info folders tell whether somebody
# has changed TensorFlow meanwhile.
fingerprint() {
  local packages
  shopt -s nullglob
  packages=("$prefix"/lib/python3.*/site-packages/{tensorflow,tensorflow_cpu,keras,numpy,horovod,hvdkit}-*.dist-info)
  shopt -u nullglob
  printf '%s\n' "$inputs" "$mpicxx|$nvcc|$cxx" "$(readlink -f "$prefix/bin/python")" "${packages[@]}" |
    sha256sum | cut -d' ' -f1
}

is_ready() {
  local library stamp=
  [[ $mpi != yes || $mpicxx ]] || return 1
  if [[ -e $prefix/.hvdkit-bootstrap ]]; then read -r stamp <"$prefix/.hvdkit-bootstrap" || true; fi
  for library in "$prefix"/lib/python3.*/site-packages/horovod/tensorflow/mpi_lib.*.so; do
    [[ -s $library && $stamp == "$(fingerprint)" ]] && return
  done
  return 1
}

write_note() {  # STAMP
  local note
  note=$(
    say "$1"
    if [[ $pins ]]; then say "pins $pins"; fi
    say "built $declined|$mpicxx|$nvcc|$cxx"
    say "tensorflow $py|$tf_dist|$tf_version|$tf_size"
    say "wheel $wheel"
  )
  say "$note" >"$prefix/.hvdkit-bootstrap"
}

read_note() {
  pins=$(recorded pins) wheel=$(recorded wheel)
  IFS='|' read -r py tf_dist tf_version tf_size <<<"$(recorded tensorflow)"
}

report_ready() {
  local offers
  if [[ $(recorded built) != "$declined|$mpicxx|$nvcc|$cxx" ]]; then
    { write_note "$(fingerprint)"; } 2>/dev/null || true  # who may only read an environment can use it, too
  fi
  offers=$(offer_mpi; offer_gpu)
  if [[ $offers ]]; then
    say "==> $prefix is ready; it was built with $engines.$offers"
  else
    say "==> $prefix is ready: nothing has changed since it was set up"
  fi
}

offer_mpi() {
  if [[ $mpicxx || ! $here_mpicxx || $declined == *mpi* ]]; then return; fi
  mpicxx=$here_mpicxx
  printf ' MPI is there now (%s): %s builds it in (%s).' "$mpicxx" "$(command_with --mpi yes)" "$(time_to_build)"
}

offer_gpu() {
  if [[ $nvcc || $driver == no || $declined == *gpu* ]]; then return; fi
  if [[ $here_nvcc ]]; then
    nvcc=$here_nvcc
    printf ' An NVIDIA driver and nvcc are there now: %s builds NCCL in (about 6 min).' "$(command_with --gpu yes)"
  elif [[ $pins && $cuda == no ]]; then
    printf ' An NVIDIA driver is there now: %q -m pip install -c %q %s installs the CUDA libraries for one GPU.' \
      "$prefix/bin/python" "$ROOT/requirements.txt" "'tensorflow[and-cuda]'"
  fi
}

command_with() {  # OPTION...
  local into=''
  if [[ $mode == into ]]; then into=$(printf -- '--into %q ' "$prefix"); fi
  say "launch/bootstrap.sh $into$*"
}

time_to_build() {
  local CXX=$cxx
  name_engines
  if [[ -e $CACHE/$(wheel_key 2>/dev/null)/SHA256SUMS ]]; then say 'about 1 min: this Horovod is in the cache'; else say 'about 3 min'; fi
}

# ----------------------------------------------------------------------------------------------------- running a stage

# stage WHAT COMMAND...: says what it does and for how long; the command's output goes to the log. The command gets a
# process group of its own, so that what ends this script (Ctrl-C, a cancelled job) ends compilers and ranks with it.
stage() {
  local what=$1 start=$SECONDS from=1 beat=30 status=0
  shift
  say "==> $what"
  if [[ -s $log ]]; then from=$(($(wc -l <"$log") + 1)); fi
  say "==> $what: $*" >>"$log"
  set -m
  "$@" >>"$log" 2>&1 </dev/null &
  job=$!
  set +m
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - start >= beat)); then say "    still at it after $((SECONDS - start)) s" && ((beat += 30)); fi
  done
  wait "$job" || status=$?
  job=''
  ((status == 0)) || explain_failure "$what" "$status" $((SECONDS - start)) "$from"
  say "    done in $((SECONDS - start)) s"
}

explain_failure() {  # WHAT STATUS SECONDS FIRST_LINE_IN_LOG
  local output pattern advice
  output=$(tail -n "+$4" "$log")
  {
    say "bootstrap.sh: failed after $3 s with exit code $2: $1"
    head -n -25 <<<"$output" | grep -E '(^|[^a-z])(fatal )?error: ' | tail -n 5 || true  # compilers' errors come early
    tail -n 25 <<<"$output"
    say "The whole log: $log"
    while IFS=$'\t' read -r pattern advice; do
      if grep -qiE -- "$pattern" <<<"$output"; then say "Likely cause: $advice"; fi
    done <<<"$(known_causes)"
  } >&2
  exit 1
}

known_causes() {  # a pattern in the log, a tab, what to tell
  printf '%s\t%s\n' \
    'no space left on device' 'the disk is full (it takes 4 GB); TMPDIR, HVDKIT_CACHE and PIP_CACHE_DIR move parts.' \
    'Killed signal|internal compiler error' 'memory ran out: compile with fewer jobs, as in MAKEFLAGS=-j1.' \
    'Exit code: 139' "a crash; Gloo has one where this host's name does not resolve: getent hosts \"\$(hostname)\" tells." \
    'name resolution|NewConnectionError|Timeout|unreachable|versions: none' 'the package index cannot be reached.' \
    'ResolutionImpossible|conflicting dep' "the environment's versions are outside hvdkit's ranges (pyproject.toml)." \
    'CMAKE_CXX_COMPILER|cannot find -lstdc\+\+' 'the system package g++ (dnf: gcc-c++) is missing or broken.' \
    'Could NOT find MPI' 'the system packages libopenmpi-dev openmpi-bin (dnf: openmpi-devel) are incomplete; --mpi no goes without.' \
    'unsupported GNU version' 'nvcc does not take this g++: install an older one and name it, as in CXX=g++-12.'
}

clean_up() {
  if [[ $job ]] && kill -- "-$job" 2>/dev/null; then wait "$job" 2>/dev/null || true; fi
  rm -rf "$tmp"
}

# ------------------------------------------------------------------------------- system packages, Python, environment

environment_runs() { "$prefix/bin/python" -c '' 2>/dev/null; }

find_python() {  # for .venv; 3.10 would do for TensorFlow 2.21, but not for the NumPy in requirements.txt
  local candidate fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  if environment_runs; then return; fi
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    # Running it is the only test: a version manager puts names on PATH that do not run.
    if "$candidate" -c "$fits" 2>/dev/null; then python=$candidate && return; fi
    [[ ! ${PYTHON:-} ]] || die "PYTHON was given '$PYTHON', and expects Python 3.11 to 3.13, as in PYTHON=python3.12"
  done
}

missing_packages() {  # prints 'deb|rpm' for each system package that is missing
  command -v "${CXX:-g++}" >/dev/null || say 'g++|gcc-c++'
  command -v make >/dev/null || say 'make|make'
  command -v flock >/dev/null || say 'util-linux|util-linux'
  [[ $mpi != yes || $mpicxx ]] || say 'libopenmpi-dev openmpi-bin|openmpi-devel'
  if environment_runs; then return; fi
  if [[ ! $python ]]; then
    say 'python3 python3-venv|python3'
  elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    say "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')|python3"
  fi
}

need_system_packages() {
  local missing debs rpms
  missing=$(missing_packages)
  [[ $missing ]] || return 0
  debs=$(cut -d'|' -f1 <<<"$missing" | xargs) rpms=$(cut -d'|' -f2 <<<"$missing" | xargs)
  if [[ $EUID == 0 && ! ${HVDKIT_NO_APT:-} ]] && command -v apt-get >/dev/null; then
    # shellcheck disable=SC2016,SC2086  # the inner shell expands $*; $debs is a list
    stage "Installing the system packages $debs with apt-get" env DEBIAN_FRONTEND=noninteractive \
      bash -c 'apt-get update && apt-get install -y --no-install-recommends $*' - $debs
    hash -r
    detect
    decide
    find_python
    missing=$(missing_packages)
  fi
  [[ $missing != *python* ]] || debs+=" (for .venv, Python 3.11 to 3.13; PYTHON=... names one that is not python3)"
  [[ ! $missing ]] || die "system packages are missing (dnf: $rpms); install them with: apt-get install $debs"
}

make_environment() {
  if ! environment_runs; then  # only .venv: a run was interrupted, or its Python has gone
    rm -rf "$prefix" && mkdir "$prefix"
    log=$prefix/bootstrap.log
    stage "Making $prefix with $("$python" -V)" "$python" -m venv "$prefix"
  fi
  log=$prefix/bootstrap.log
  : >"$log" || die "'$prefix' cannot be written to; use an environment of your own"
  "$prefix/bin/python" -m pip --version >>"$log" 2>&1 ||
    stage "Putting pip into $prefix, which has none" "$prefix/bin/python" -m ensurepip --upgrade
}

# Read from the metadata: importing TensorFlow takes seconds. Its size tells builds of one version apart. What TensorFlow
# requires is kept with it: pip minds the needs of what it installs, not of what is there, and would lift protobuf above
# the version that TensorFlow takes.
read_environment() {
  local facts
  facts=$("$prefix/bin/python" - "$tmp/own.txt" <<'PY'
import sys
if sys.version_info < (3, 10):  # check_environment() turns it down
    sys.exit(print("%d.%d|||" % sys.version_info[:2]))
import importlib.metadata as metadata, pathlib, re

# One spelling: some wheels write tensorflow_cpu.
version = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
names = ("tensorflow", "tensorflow-cpu", "tensorflow-rocm", "tf-nightly")
tensorflow = next((name for name in names if name in version), "")
kept = {name: f"{name}=={version[name]}" for name in (tensorflow, "keras", "numpy") if name in version}
for need in tensorflow and metadata.requires(tensorflow) or ():
    if "extra ==" not in need:
        kept.setdefault(re.match(r"[\w.-]+", need)[0], need)
pathlib.Path(sys.argv[1]).write_text("\n".join(kept.values()))
library = tensorflow and metadata.distribution(tensorflow).locate_file("tensorflow/libtensorflow_framework.so.2")
size = library.stat().st_size if library and library.exists() else ""
print("%d.%d" % sys.version_info[:2], tensorflow, version.get(tensorflow, ""), size, sep="|")
PY
  )
  IFS='|' read -r py tf_dist tf_version tf_size <<<"$facts"
}

check_environment() {
  local oldest=10
  # A run that was interrupted leaves our TensorFlow behind: the note says that it is not the user's.
  if [[ $mode == into && $tf_version != "$pins" ]]; then own_tf=yes; fi
  if [[ $own_tf == no ]]; then oldest=11; fi  # as in find_python()
  [[ $py == 3.* && ${py#3.} -ge $oldest && ${py#3.} -le 13 ]] ||
    die "'$prefix' has Python $py, and expected is 3.$oldest to 3.13; use another environment"
  [[ $own_tf == no || $tf_version =~ ^2\.(1[6-9]|2[01])\. ]] ||
    die "'$prefix' has $tf_dist $tf_version, and expected is 2.16 to 2.21; change it, or use another environment"
  [[ $own_tf == no || $nccl == no || $tf_dist == tensorflow ]] ||
    die "'$prefix' has $tf_dist, which cannot use a GPU; install tensorflow in its place, or say --gpu no"
}

# -------------------------------------------------------------------------------------------------- TensorFlow, Horovod

install_tensorflow() {
  pins=
  if [[ $own_tf == no ]]; then pins=$(sed -n 's/^tensorflow==//p' "$ROOT/requirements.txt"); fi
  write_note unfinished
  if [[ $own_tf == no ]]; then
    # With a driver TensorFlow gets its CUDA libraries even where Horovod goes without NCCL: one GPU is of use, too.
    local extra=()
    if [[ $nccl == yes || $cuda == yes ]]; then extra=('tensorflow[and-cuda]'); fi
    stage "Installing TensorFlow, Keras and the rest of requirements.txt (about 2 min)" \
      "$prefix/bin/python" -m pip install -r "$ROOT/requirements.txt" "${extra[@]}"
  elif [[ $nccl == yes && ! $(nccl_home) ]]; then
    stage "Installing the CUDA libraries of TensorFlow $tf_version (about 3 min)" \
      "$prefix/bin/python" -m pip install -c "$tmp/own.txt" 'tensorflow[and-cuda]'
  fi
  read_environment
}

nccl_home() {  # the folder with include/nccl.h: the nvidia-nccl wheel, else a conda or system package
  local home
  for home in "$prefix"/lib/python3.*/site-packages/nvidia/nccl "$prefix" /usr; do
    if [[ -e $home/include/nccl.h ]]; then say "$home" && return; fi
  done
}

# What the compiled library depends on and the readable half of the name does not say, is in the hash: processor, C
# library, flags, where MPI and NCCL are, and, through the text of the functions, how it is built.
wheel_key() {
  local compiler=${CXX:-g++}
  printf 'py%s-tf%s-hvd%s-%s%s-%s-%.8s\n' "$py" "$tf_version" "$VERSION" "$(basename "${compiler/g++/gcc}")" \
    "$("$compiler" -dumpfullversion -dumpversion)" "$engines" "$({
      uname -m
      grep -m1 -oE '\b(avx|f16c|fma)\b' /proc/cpuinfo || true
      getconf GNU_LIBC_VERSION
      "$compiler" --version
      printf '%s\n' "${CFLAGS:-}" "${CXXFLAGS:-}" "${CPPFLAGS:-}" "${LDFLAGS:-}" "$tf_dist $tf_size"
      if [[ $mpicxx ]]; then say "$mpicxx" && "$mpicxx" -show; fi
      if [[ $nccl == yes ]]; then "$nvcc" --version && grep -E 'define NCCL_M' "$(nccl_home)/include/nccl.h"; fi
      declare -f patch_source build_wheel
    } | sha256sum)"
}

# What an earlier wheel must have in common with what is wanted now, to be installed again. The compilers' versions are
# not among it: they may be newer by now, or gone.
ingredients() {
  {
    printf '%s\n' "$VERSION" "$py $tf_dist $tf_version $tf_size" "$mpicxx|$nvcc|$cxx" \
      "${CFLAGS:-}" "${CXXFLAGS:-}" "${CPPFLAGS:-}" "${LDFLAGS:-}"
    declare -f patch_source build_wheel
  } | sha256sum | cut -d' ' -f1
}

is_whole() { (cd "$1" 2>/dev/null && sha256sum --status -c SHA256SUMS 2>/dev/null); }

# An environment that was built with what has gone since, and whose wheel does not serve again, does without it.
use_what_is_there() {
  local was=$engines
  if [[ $mpicxx && ! -x $mpicxx ]]; then mpicxx=$here_mpicxx; fi
  if [[ $nvcc && ! -x $nvcc ]]; then nvcc=$here_nvcc; fi
  name_engines
  [[ $was == "$engines" ]] || say "==> Horovod was built with $was, whose compiler has gone; it is now built with $engines"
}

obtain_wheel() {  # sets $entry, the folder in the cache that holds the wheel
  local name made_of
  read -r name made_of <<<"$wheel"
  if [[ $made_of != "$(ingredients)" ]] || ! is_whole "$CACHE/$name"; then
    use_what_is_there
    name=$(wheel_key)
  fi
  entry=$CACHE/$name wheel="$name $(ingredients)"
  exec 8>"$entry.lock"
  flock -n 8 || stage "Waiting for another bootstrap that builds the same Horovod" flock 8
  if is_whole "$entry"; then
    say "==> Horovod is in the cache: $entry"
  else
    if [[ -e $entry ]]; then say "==> $entry is damaged, and is built anew"; fi
    stage "Fetching the source of Horovod $VERSION and its build tools" fetch_source
    stage "Compiling Horovod with $engines (on two cores 2 min, with NCCL 5)" build_wheel
    # Made aside, then renamed: what stands under its name is whole.
    rm -rf "$entry" "$entry.new"
    mv "$tmp/wheel" "$entry.new"
    mv -T "$entry.new" "$entry"
  fi
  exec 8>&-
}

# The build tools go into a folder of their own, so that the environment keeps its setuptools. Horovod's setup.py would
# itself fetch a cmake that is too old for anything today if it found none.
fetch_source() {
  local tools=('setuptools<81' wheel packaging) cmake
  cmake=$(cmake --version 2>/dev/null | sed -n '1s/.* //p') || true
  if ! printf '%s\n' 3.13 "${cmake:-0}" | sort -CV; then tools+=('cmake<4'); fi
  "$prefix/bin/python" -m pip install --target "$tmp/tools" "${tools[@]}"
  printf 'horovod==%s --hash=sha256:%s\n' "$VERSION" "$SHA256" >"$tmp/horovod.txt"
  PYTHONPATH=$tmp/tools "$prefix/bin/python" -m pip download --no-deps --no-build-isolation --no-binary horovod \
    --require-hashes -r "$tmp/horovod.txt" -d "$tmp"
  tar -xzf "$tmp/horovod-$VERSION.tar.gz" -C "$tmp"
  patch_source "$tmp/horovod-$VERSION"
}

patch_source() {  # SOURCE
  # xla_mpi_ops.cc includes XLA headers that TensorFlow ships no more since 2.19. It only registers custom calls for
  # XLA on GPUs, which are off by default, so without it the rest compiles and nothing is missed.
  sed -i '/xla_mpi_ops\.cc/d' "$1/horovod/tensorflow/CMakeLists.txt"
  # TensorFlow no longer exports AsGpuStreamValue: a library with NCCL would link, and then not load. The stream's own
  # (virtual) accessor gives the same handle.
  sed -i -e '/^#endif \/\/ HAVE_GPU$/i GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {' \
    -e '//i return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream); }' \
    "$1/horovod/tensorflow/mpi_ops.cc"
  # Horovod's ranks ask each other every millisecond what there is to do, even if nothing goes through Horovod; of a core
  # that trains, this takes 8 %. Where hvdkit sends the gradients itself, it calls the function that is added here: the
  # ranks then wait a tenth of the time since the last collective, at most so long.
  sed -i -f - "$1/horovod/common/operations.cc" <<'EOF'
/^bool RunLoopOnce(HorovodGlobalState& state) {$/i \
static std::atomic<double> longest_idle_cycle_ms{0};\
static auto last_collective = std::chrono::steady_clock::now();\
extern "C" void horovod_set_longest_idle_cycle_ms(double value) { longest_idle_cycle_ms = value; }\
static double CycleMs(double usual) {\
  std::chrono::duration<double, std::milli> idle = std::chrono::steady_clock::now() - last_collective;\
  return std::max(usual, std::min(longest_idle_cycle_ms.load(), idle.count() / 10)); }\

s/state\.parameter_manager\.CycleTimeMs() \* 1000\.)) -$/CycleMs(state.parameter_manager.CycleTimeMs()) * 1000.)) -/
/^    should_shutdown |= response_list\.shutdown();$/i \
    if (!response_list.responses().empty()) last_collective = std::chrono::steady_clock::now();
EOF
  [[ $(grep -cE 'CycleMs\(state|^    if .* last_collective = ' "$1/horovod/common/operations.cc") == 2 ]]
  # NCCL's wheel has no libnccl.so for a linker to find, only the name that the loader wants.
  sed -i 's/set(NCCL_LIBNAME "nccl")/set(NCCL_LIBNAME "libnccl.so.2")/' "$1/cmake/Modules/FindNCCL.cmake"
  # The library first looks beside itself, in whichever environment the wheel lands: for NCCL's wheel, for conda's MPI.
  # shellcheck disable=SC2016  # CMake and the loader expand these
  printf '%s\n' 'set_target_properties(${TF_TARGET_LIB} PROPERTIES BUILD_WITH_INSTALL_RPATH TRUE' \
    '  INSTALL_RPATH "$ORIGIN/../../nvidia/nccl/lib;$ORIGIN/../../../.." INSTALL_RPATH_USE_LINK_PATH TRUE)' \
    >>"$1/horovod/tensorflow/CMakeLists.txt"
}

build_wheel() {
  local home memory
  ln -s "$prefix" "$tmp/env"  # Horovod's CMake files split TensorFlow's path at spaces: this one has none
  memory=$(awk '/^MemAvailable/ { print int($2 / 1500000) + 1 }' /proc/meminfo)  # jobs that fit, each up to 1.5 GB
  export PYTHONPATH=$tmp/tools MAKEFLAGS=${MAKEFLAGS:--j$(printf '%s\n' "$memory" "$(nproc)" | sort -n | head -n 1)}
  export CXX=${CXX:-g++}  # the one in the key: CMake alone would take c++, which may be another
  export CMAKE_POLICY_VERSION_MINIMUM=3.5  # Gloo's files ask for one that CMake 4 has dropped
  export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
  if [[ -e $tmp/tools/bin/cmake ]]; then export HOROVOD_CMAKE=$tmp/tools/bin/cmake; fi
  if [[ $mpicxx ]]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
  if [[ $nccl == yes ]]; then
    # nvcc may be a wrapper that lies elsewhere; itself it knows where its toolkit is.
    home=${CUDA_HOME:-$({ "$nvcc" --dryrun none.cu 2>&1 || true; } | sed -n 's/^#\$ _HERE_=//p')/..}
    export HOROVOD_CUDA_HOME=$home CUDAToolkit_ROOT=$home CUDACXX=$home/bin/nvcc
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_HOME
    HOROVOD_NCCL_HOME=$(nccl_home)
  fi
  cd "$tmp/horovod-$VERSION"
  "$tmp/env/bin/python" -m pip wheel -v --no-build-isolation --no-deps -w "$tmp/wheel" .
  cd "$tmp/wheel"
  sha256sum -- *.whl >SHA256SUMS
}

# ------------------------------------------------------------------------------------------------- hvdkit and the proof

install_venv() {
  "$prefix/bin/python" -m pip install --no-deps --force-reinstall "$entry"/horovod-*.whl
  cd "$ROOT"
  "$prefix/bin/python" -m pip install -c requirements.txt -e '.[dev]'
}

# From a copy, since setuptools leaves build/ and *.egg-info where it builds. hvdkit's need for `tensorflow` is left out
# when its other needs are met: here it may be fulfilled by tensorflow-cpu, which pip would not count.
install_into() {
  local constraints=$ROOT/requirements.txt part
  if [[ $own_tf == yes ]]; then constraints=$tmp/own.txt; fi
  mkdir "$tmp/copy"
  for part in pyproject.toml requirements.txt README.md LICENSE MANIFEST.in hvdkit models; do
    if [[ -e $ROOT/$part ]]; then cp -R "$ROOT/$part" "$tmp/copy/"; fi
  done
  "$prefix/bin/python" -m pip install --no-deps --force-reinstall "$entry"/horovod-*.whl "$tmp/copy"
  "$prefix/bin/python" - >"$tmp/needs.txt" <<'PY'
import importlib.metadata as metadata, re
needs = [*metadata.requires("horovod"), *metadata.requires("hvdkit")]
print(*(need for need in needs if "extra ==" not in need and re.match(r"[\w.-]+", need)[0] != "tensorflow"), sep="\n")
PY
  "$prefix/bin/python" -m pip install -c "$constraints" -r "$tmp/needs.txt"
}

build_native() {  # of the hvdkit that is installed, not of one in the folder that this is called from
  cd "$tmp"
  "$prefix/bin/python" -m hvdkit.native
}

prove() {
  cat >"$tmp/proof.py" <<'PY'
import horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
gpus = tf.config.list_physical_devices("GPU")
mine = [gpus[hvd.local_rank()]] if hvd.nccl_built() and len(gpus) >= 2 else []  # two ranks cannot share one GPU
tf.config.set_visible_devices(mine, "GPU")
total = float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum))
if hvd.size() != 2 or total != 3.0:
    raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: the sum of 1 and 2 came out as {total}")
built = "+".join(name for name in ("gloo", "mpi", "nccl") if getattr(hvd, name + "_built")())
untried = "" if mine or not hvd.nccl_built() else "; NCCL is linked and loads; trying it takes a driver and two GPUs"
print(f"proof: Horovod with {built} sums right on", ("GPUs" if mine else "the CPU") + untried)
PY
  # horovodrun takes a library that does not load for one built without Gloo: the loader's own words say more.
  stage "Loading what was compiled" "$prefix/bin/python" -c 'import horovod.tensorflow'
  stage "Compiling hvdkit's own operations (30 s)" build_native
  stage "Proving it: two ranks, one allreduce (about 20 s)" \
    timeout -k 10 300 "$prefix/bin/horovodrun" -np 2 --gloo "$prefix/bin/python" "$tmp/proof.py"
  sed -n 's/.*proof: /    /p' "$log" | sort -u
}

main() {
  parse_arguments "$@"
  check_prefix
  detect
  decide
  read_note
  hash_inputs
  if is_ready; then report_ready; exit; fi

  # Whatever the caller's shell has set for Python, pip or Horovod must not decide what is built or where it goes.
  # shellcheck disable=SC2086  # a list of names
  unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV ${!HOROVOD_@}
  export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
  export TF_CPP_MIN_LOG_LEVEL=3
  trap clean_up EXIT
  tmp=$(mktemp -d "${TMPDIR:-/tmp}/hvdkit-bootstrap.XXXXXX")
  export TMPDIR=$tmp  # a pip that is killed leaves gigabytes behind: they go with the rest
  log=$tmp/bootstrap.log
  mkdir -p "$CACHE" || die "the cache '$CACHE' cannot be made; name another folder in HVDKIT_CACHE"

  use_compiler
  find_python
  need_system_packages
  exec 9>"$CACHE/environment-$(cksum <<<"$prefix" | cut -d' ' -f1).lock"
  flock -n 9 || stage "Waiting for another bootstrap of $prefix" flock 9
  decide
  read_note
  use_compiler
  if is_ready; then say "==> $prefix is ready: another bootstrap has just set it up" && exit; fi
  make_environment
  read_environment
  check_environment
  install_tensorflow
  obtain_wheel
  stage "Installing hvdkit and Horovod" "install_$mode"
  prove
  write_note "$(fingerprint)"
  say "==> Ready after $SECONDS s: source '$prefix/bin/activate'"
}

# Tests source this file, to call its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
