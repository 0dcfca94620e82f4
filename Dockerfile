# gradjax as an image:
#
#   docker build -t gradjax .                           for CPUs
#   docker build -t gradjax --build-arg EXTRA=cuda .    for NVIDIA GPUs (docker run --gpus=all)
#
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" gradjax spectra
#
# Files are read and written in the folder that is mounted at /data, where downloads are kept as well.
FROM python:3.12-slim

ARG EXTRA=""

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gradjax gradjax
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir ".[all${EXTRA:+,$EXTRA}]"

RUN useradd --create-home --home-dir /data gradjax
USER gradjax
# Whoever --user is has the same home.
ENV HOME=/data
WORKDIR /data
ENTRYPOINT ["gradjax"]
