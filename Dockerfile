# The command `tuner`, run by a user without rights. docker-compose.yml builds it; by hand:
#
#   docker build --tag tuner .
#
# PyPI's torch brings CUDA along. Machines without a GPU need far less:
#
#   docker build --tag tuner --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim

# A fixed number, so that clusters can check that it is not root, and volumes can be given to it.
RUN groupadd --gid 10001 tuner \
    && useradd --uid 10001 --gid tuner --create-home --no-log-init tuner \
    && install --directory --owner=tuner --group=tuner /artifacts

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /usr/src/tuner

# The libraries are a layer of their own: after a change in tuner/ they need no new download.
ARG TORCH_INDEX=""
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; \
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}

# Optional dependencies by name, with commas between: --build-arg EXTRAS=timm
ARG EXTRAS=""
COPY README.md LICENSE ./
COPY tuner tuner
RUN pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

ENV PYTHONUNBUFFERED=1 \
    TUNER_DATA=/data \
    TUNER_ARTIFACTS=/artifacts
USER 10001:10001
WORKDIR /home/tuner

# No shell in between: SIGTERM has to reach the worker.
ENTRYPOINT ["tuner"]
CMD ["--help"]
