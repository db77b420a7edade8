# hvdkit with everything it needs: `docker run IMAGE` trains two ranks on the embedded digits.
#
#   docker build -t hvdkit .                                                             for CPUs
#   docker build -t hvdkit-gpu --build-arg GPU=yes \
#     --build-arg BASE_IMAGE=nvidia/cuda:12.5.1-devel-ubuntu24.04 .                      for GPUs, with NCCL
#
# BASE_IMAGE needs apt-get and Python 3.11 or newer. The same script sets up this image and a checkout: launch/bootstrap.sh.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
ARG GPU=no
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY launch /src/launch
COPY hvdkit /src/hvdkit
COPY models /src/models
COPY requirements.txt pyproject.toml README.md LICENSE /src/
# Compiles Horovod, and ends with two ranks that prove it: an image whose Horovod does not work is not built.
# (Builders without a network of their own leave the host's name unresolved; Gloo would crash on that.)
RUN { getent hosts "$(hostname)" || echo "127.0.0.1 $(hostname)" >>/etc/hosts; } \
 && python3 -m venv /opt/hvdkit \
 && HVDKIT_CACHE=/tmp/cache /src/launch/bootstrap.sh --into /opt/hvdkit --gpu ${GPU} \
 && rm -rf /tmp/cache /opt/hvdkit/bootstrap.log

FROM ${BASE_IMAGE}
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 hvdkit
COPY --from=build /opt/hvdkit /opt/hvdkit
ENV PATH=/opt/hvdkit/bin:$PATH PYTHONUNBUFFERED=1
USER hvdkit
WORKDIR /home/hvdkit
ENTRYPOINT ["python", "-m", "hvdkit.launch"]
CMD ["-np", "2", "--", "python", "-m", "hvdkit.train"]
