# The program with its packages. docs/clusters.md has the commands; nobody has built these images yet.
#   docker build --target cpu -t adapters:cpu .
#   docker build --target cuda -t adapters:cuda .
FROM python:3.11-slim AS system
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/app/models/huggingface
WORKDIR /app
COPY requirements.txt .

FROM system AS cpu
# torch from PyPI brings CUDA's libraries, several GB that a CPU has no use for
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
RUN pip install -r requirements.txt
COPY . .

FROM system AS cuda
# the libraries of CUDA are in torch's wheel; the driver is the host's (NVIDIA's container toolkit)
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles what it launches
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install -r requirements.txt
COPY . .
