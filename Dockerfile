# selfteach with all its extras, tested versions, as a user without rights.
#
#   docker build -t selfteach .                                      CPU
#   docker build -t selfteach:cuda --build-arg TORCH_BACKEND=cu130 . NVIDIA GPUs (the host's driver)
#   docker run --rm -v "$PWD:/work" selfteach check recipe.toml
#   docker run --rm --gpus all -v "$PWD:/work" selfteach:cuda train recipe.toml --out runs/first
FROM python:3.12-slim

# Triton compiles its kernels' launchers with a C compiler when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
	&& apt-get install --yes --no-install-recommends gcc libc6-dev git \
	&& rm -rf /var/lib/apt/lists/* \
	&& pip install --no-cache-dir uv==0.13.9

# uv takes torch from the index of this backend: cpu, cu126, cu128, cu130, rocm6.4 ...
ARG TORCH_BACKEND=cpu
WORKDIR /opt/selfteach
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN useradd --create-home --uid 1000 selfteach \
	&& uv pip install --system --no-cache --torch-backend="${TORCH_BACKEND}" --constraints constraints.txt \
	'.[problems,gguf,math,endpoint,hub,plan,tensorboard,wandb,trackio]'

USER 1000
# Telemetry off. None of these is a secret, whatever their names hold.
# hadolint ignore=DL3064
ENV HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
WORKDIR /work
ENTRYPOINT ["selfteach"]
CMD ["--help"]
