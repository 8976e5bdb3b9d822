# docker build --target cpu -t chipdeploy:cpu .      then: docker run --rm -v "$PWD:/work" chipdeploy:cpu demo
# docker build --target gpu -t chipdeploy:gpu .      then: docker run --rm --gpus all -v "$PWD:/work" chipdeploy:gpu doctor
#
# The folder that is mounted at /work must be writable by uid 10001, or give --user "$(id -u):$(id -g)".

# Both images stand on plain Python. For the GPU an nvidia/cuda image would bring CUDA and cuDNN a second time: they come
# as pip's wheels, for torch, ONNX Runtime and TensorRT alike. Only the driver is the host's.
FROM python:3.11.14-slim-bookworm AS python

FROM python AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY chipdeploy chipdeploy
COPY cli cli
COPY profiles profiles
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# PyPI's torch for Linux is the CUDA build, 5.4 GB on disk, in the image for CPUs as well: torch without CUDA is
# published elsewhere, and the pins of constraints.txt hold for PyPI.
FROM wheel AS cpu-packages
RUN python -m venv /opt/chipdeploy \
    && /opt/chipdeploy/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo /dist/*.whl)[cpu]"

FROM wheel AS gpu-packages
RUN python -m venv /opt/chipdeploy \
    && /opt/chipdeploy/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo /dist/*.whl)[gpu,trt]"

# What both images share. No compiler is in them: targets that end in -compile do not run there.
FROM python AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="chipdeploy" \
      org.opencontainers.image.description="Prune a CNN to a budget with ChipNet, cut it for real, export it, and measure the speedup." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 chipdeploy \
    && useradd --uid 10001 --gid 10001 --create-home chipdeploy \
    && install --directory --owner chipdeploy --group chipdeploy /work
# Caches go to /tmp: with --user there is no home.
ENV PATH="/opt/chipdeploy/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /work
VOLUME /work
# The check imports torch and runs a network, which takes seconds of a core: rarely is often enough.
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["chipdeploy", "doctor"]
ENTRYPOINT ["chipdeploy"]
CMD ["--help"]

FROM runtime AS gpu
# What the NVIDIA container runtime is to mount: the driver's libraries for CUDA, and NVML.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-packages /opt/chipdeploy /opt/chipdeploy

# Last, so that it is built where no target is named.
FROM runtime AS cpu
COPY --from=cpu-packages /opt/chipdeploy /opt/chipdeploy
