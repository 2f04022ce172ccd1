# An image for GPU nodes: everything of requirements/cuda.lock, by hash, and windlass itself. The CUDA libraries come with
# the packages; the node brings the driver (NVIDIA container toolkit). No secret and no model is built in.
#   docker build -t registry/windlass:1 .
FROM python:3.11.14-slim-bookworm

# torch and DeepSpeed build extensions on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git tini wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 windlass
WORKDIR /opt/windlass

# The dependencies alone first, so that another version of windlass takes seconds.
COPY requirements/cuda.lock requirements/cuda.lock
RUN python -m pip install --no-cache-dir --no-deps --require-hashes -r requirements/cuda.lock

COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY data data
COPY rollout rollout
COPY reward reward
COPY trainer trainer
COPY launch launch
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e .

ENV HF_HUB_OFFLINE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    OMP_WAIT_POLICY=PASSIVE

# KubeRay's pods call bash and wget as this user.
USER windlass
WORKDIR /home/windlass
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["windlass", "doctor"]
