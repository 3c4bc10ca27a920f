# NVLM 1.0 with flash-attention, for NVIDIA GPUs (CUDA 12.8). Built and run by nobody yet: see the README.
#   docker build -t nvlm .
#   docker run --gpus all --rm -it -v /path/to/NVLM-D-72B:/model:ro nvlm chat /model --image /model/page.jpg
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-devel
# The model card's own base, for its exact benchmark environment (too old for this package's transformers):
# FROM nvcr.io/nvidia/pytorch:23.09-py3

ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/home/nvlm/.cache/huggingface

# Ready-made for this torch and CUDA where a wheel exists, compiled otherwise.
RUN pip install --no-cache-dir ninja==1.13.0 packaging==25.0 \
    && MAX_JOBS=8 pip install --no-cache-dir --no-build-isolation flash-attn==2.8.3

WORKDIR /opt/nvlm
COPY . .
RUN pip install --no-cache-dir transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 av==18.1.0 \
    && pip install --no-cache-dir .

RUN useradd --create-home --uid 10001 nvlm
USER 10001
WORKDIR /home/nvlm
ENTRYPOINT ["nvlm"]
CMD ["--help"]
