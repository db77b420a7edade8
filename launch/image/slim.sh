#!/usr/bin/env bash
# Removes files that are not needed at run time from an environment, for an image: slim.sh PREFIX
#
# It removes C++ headers, static libraries, the packages' own tests, libclang (TensorFlow requires it but does not use
# it at run time), and symbol tables for debuggers. After that, custom operations can no longer be compiled there. Bytecode
# stays, since users without write permission would compile the sources again at each start.
set -euo pipefail

[[ $# == 1 && -e $1/pyvenv.cfg ]] || { echo "slim.sh: expected the folder of a venv, as in: slim.sh /opt/hvdkit" >&2; exit 2; }
packages=("$1"/lib/python3.*/site-packages)
cd "${packages[0]}"

rm -rf tensorflow/include tensorflow/xla_aot_runtime_src pyarrow/include nvidia/*/include clang/native
find . -type d -name tests -prune -exec rm -rf {} +
find . -name '*.a' -delete
# Strip only these libraries: strip breaks some that auditwheel has patched.
strip --strip-unneeded horovod/tensorflow/mpi_lib.*.so tensorflow/lib*.so.2 tensorflow/python/profiler/internal/_pywrap_*.so
