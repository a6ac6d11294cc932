# sfkt in a container; docs/export.md has the commands. TORCH: cpu, or a CUDA build such as cu128.
FROM python:3.12-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/$TORCH"
COPY . /src
RUN pip install --no-cache-dir "/src[onnx,timm,imagenet]" && rm -r /src
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["sfkt"]
CMD ["--help"]
