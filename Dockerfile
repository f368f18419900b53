# docker build -t mythos . && docker run --rm --gpus all -v "$PWD:/work" mythos train quickstart
# The base image provides the CUDA runtime. torch brings its own CUDA libraries, of the same version.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# torch.compile needs gcc and Python's headers. Versions are not pinned: the archive deletes old ones with each security
# update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/mythos/bin:$PATH \
    PYTHONUNBUFFERED=1

COPY pyproject.toml README.md LICENSE /build/
COPY mythos /build/mythos
COPY configs /build/configs
RUN python3 -m venv /opt/mythos \
    && pip install --no-cache-dir /build \
    && rm -r /build

# Runs are written to /work: mount a folder that this user may write to, or pass --user.
RUN useradd --create-home --uid 10001 mythos \
    && mkdir /work \
    && chown mythos:mythos /work
USER 10001
WORKDIR /work

ENTRYPOINT ["mythos"]
CMD ["--help"]
