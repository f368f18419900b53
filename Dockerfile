# docker build -t mythos . && docker run --rm --gpus all -v "$PWD:/work" mythos train quickstart
# The base holds the CUDA runtime; torch brings the CUDA libraries that it was built with, of the same version.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and Python's headers are for torch.compile. Versions are those of the release of the base: pinned ones vanish from
# the archive with each security update.
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

# Runs are written to the working directory: mount a folder that this user may write to, or give --user.
RUN useradd --create-home --uid 10001 mythos \
    && mkdir /work \
    && chown mythos:mythos /work
USER 10001
WORKDIR /work

ENTRYPOINT ["mythos"]
CMD ["--help"]
