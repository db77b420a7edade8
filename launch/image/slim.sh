#!/usr/bin/env bash
# Takes out of an environment what running it does not need, for an image: slim.sh PREFIX
#
# What goes: C++ headers and static libraries, the packages' own tests, libclang (TensorFlow names it as a need, and uses
# it nowhere when it runs), and the symbol tables that only a debugger reads. Operations of one's own can no longer be compiled
# there. Bytecode stays: who may not write beside the sources would compile them at each start.
set -euo pipefail

[[ $# == 1 && -e $1/pyvenv.cfg ]] || { echo "slim.sh: expected is the folder of a venv, as in: slim.sh /opt/hvdkit" >&2; exit 2; }
packages=("$1"/lib/python3.*/site-packages)
cd "${packages[0]}"

rm -rf tensorflow/include tensorflow/xla_aot_runtime_src pyarrow/include nvidia/*/include clang/native
find . -type d -name tests -prune -exec rm -rf {} +
find . -name '*.a' -delete
# Only these: wheels' libraries that were patched after linking (auditwheel) do not all survive strip.
strip --strip-unneeded horovod/tensorflow/mpi_lib.*.so tensorflow/lib*.so.2 tensorflow/python/profiler/internal/_pywrap_*.so
