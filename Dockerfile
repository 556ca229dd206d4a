# An image with the command jaxgpt, for CPUs, or for NVIDIA GPUs:
#
#     docker build -t jaxgpt .
#     docker build -t jaxgpt:cuda --build-arg EXTRAS=cuda13 .
#     docker run --rm -v "$PWD/runs:/app/runs" --user "$(id -u):$(id -g)" jaxgpt --config quickstart
#     docker run --rm --gpus all -v "$PWD/runs:/app/runs" --user "$(id -u):$(id -g)" jaxgpt:cuda --config quickstart
#
# JAX's wheels for CUDA bring its libraries, so both have one base; a GPU needs the host's driver and NVIDIA's container
# toolkit. docs/platforms.md.
FROM python:3.13-slim

# More of pyproject.toml's extras, with commas between them: cuda12, cuda13, hub, ...
ARG EXTRAS=""

WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./
COPY configs configs
COPY jaxgpt jaxgpt
RUN pip install --no-cache-dir --constraint constraints.txt ".[chat,data,gguf,serve${EXTRAS:+,$EXTRAS}]"

# Caches go below HOME; whoever --user names may write there, and with the sticky bit nobody may replace what is another's:
# only so are compiled programs kept there.
ENV HOME=/app
RUN mkdir -p /app/runs && chmod -R 1777 /app
WORKDIR /app
USER 1000:1000

ENTRYPOINT ["jaxgpt"]
