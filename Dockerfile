# An image with hvdkit and all its dependencies. `docker run IMAGE` trains two ranks on the embedded digits.
#
#   docker build -t hvdkit .                                                             for CPUs
#   docker build -t hvdkit-gpu --build-arg GPU=yes --build-arg FINAL_IMAGE=ubuntu:24.04 \
#     --build-arg BASE_IMAGE=nvidia/cuda:12.5.1-devel-ubuntu24.04 .                      for GPUs, with NCCL
#
# launch/bootstrap.sh sets up this image as it sets up a checkout, with the package versions of requirements.txt.
# BASE_IMAGE, for the build, needs apt-get and Python 3.11 to 3.13. A digest pins it: BASE_IMAGE=debian@sha256:...
# FINAL_IMAGE, the base of the final image, must be of the same release. It needs no CUDA: only the build needs the
# compiler, and TensorFlow brings the CUDA libraries.
# The OCI format has no HEALTHCHECK: pass `--format docker` to `buildah` and `podman`.
ARG BASE_IMAGE=debian:bookworm-slim
ARG FINAL_IMAGE=${BASE_IMAGE}

FROM ${BASE_IMAGE} AS build
ARG GPU=no
# Versions are not pinned: the distribution's release fixes them and provides security updates.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ libopenmpi-dev make openmpi-bin python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY launch/bootstrap.sh launch/image/slim.sh /src/launch/
COPY hvdkit /src/hvdkit
COPY models /src/models
COPY requirements.txt pyproject.toml README.md LICENSE /src/
# bootstrap.sh compiles Horovod and tests it with two ranks, so the build fails if Horovod does not work.
# The cache mounts keep pip's downloads and the built Horovod for the next build, outside the image.
# In builders without their own network the host's name does not resolve, and Gloo would crash: add it to /etc/hosts.
RUN --mount=type=cache,id=hvdkit,target=/root/.cache/hvdkit --mount=type=cache,id=hvdkit-pip,target=/root/.cache/pip \
    { getent hosts "$(hostname)" || echo "127.0.0.1 $(hostname)" >>/etc/hosts; } \
 && python3 -m venv /opt/hvdkit \
 && /src/launch/bootstrap.sh --into /opt/hvdkit --gpu ${GPU} --mpi yes \
 && rm -f /opt/hvdkit/bootstrap.log \
 && /src/launch/slim.sh /opt/hvdkit

FROM ${FINAL_IMAGE}
ARG VERSION=0.1.0
ARG SOURCE=
ARG REVISION=
LABEL org.opencontainers.image.title="hvdkit" \
      org.opencontainers.image.description="Train Keras 3 models on TensorFlow across GPUs and hosts with Horovod" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}"
# Debian's openssh-server creates host keys at installation. Remove them, since all users of the image would share them.
# The user has no password but is not locked: an sshd that root starts would refuse a locked user.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates openmpi-bin openssh-client openssh-server python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /etc/ssh/ssh_host_*_key* \
 && useradd --create-home --uid 10001 --user-group --shell /bin/bash --password '*' hvdkit \
 && install -d -o hvdkit -g hvdkit -m 700 /home/hvdkit/.ssh
COPY --from=build /opt/hvdkit /opt/hvdkit
COPY launch/image/healthcheck.py launch/image/exchange.py /opt/hvdkit/
COPY launch/image/ssh_config /etc/ssh/ssh_config.d/hvdkit.conf
COPY launch/image/sshd_config /home/hvdkit/.sshd_config
ENV PATH=/opt/hvdkit/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Test the final image as its user, over Gloo and over MPI.
RUN { getent hosts "$(hostname)" || echo "127.0.0.1 $(hostname)" >>/etc/hosts; } \
 && export HOME=/home/hvdkit \
 && runuser -u hvdkit -- python -I /opt/hvdkit/healthcheck.py \
 && runuser -u hvdkit -- python -m hvdkit.launch -np 2 -- python /opt/hvdkit/exchange.py \
 && runuser -u hvdkit -- python -m hvdkit.launch -np 2 --mpi -- python /opt/hvdkit/exchange.py
# Give a number: Kubernetes' runAsNonRoot cannot verify a user name.
USER 10001:10001
WORKDIR /home/hvdkit
EXPOSE 2222
HEALTHCHECK --interval=5m --timeout=60s CMD ["python", "-I", "/opt/hvdkit/healthcheck.py"]
ENTRYPOINT ["python", "-m", "hvdkit.launch"]
CMD ["-np", "2", "--", "python", "-m", "hvdkit.train"]
