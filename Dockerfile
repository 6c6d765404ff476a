# The service on NVIDIA's Triton. Build the image, and mount an exported model repository:
#   docker build -t llamarec .
#   docker run --gpus all -p 8001:8001 -v $PWD/model_repository:/models llamarec
# 25.07 is the first release that fixes the HTTP vulnerabilities of August 2025. Pin the digest of the tag in your
# registry; it could not be looked up when this file was written.
ARG TRITON=nvcr.io/nvidia/tritonserver:25.07-py3
FROM ${TRITON}

WORKDIR /opt/llamarec
COPY pyproject.toml README.md LICENSE constraints-serve.txt ./
COPY client client
COPY preprocessing preprocessing
COPY models models
COPY export export
COPY serving serving
COPY stores stores
COPY llamarec llamarec
COPY model_repository model_repository
# Only the `serve` extra: the image has Python 3.12, which NVTabular does not support.
RUN python3 -m pip install --no-cache-dir --break-system-packages -c constraints-serve.txt ./client '.[serve]' \
    && useradd --create-home --uid 10001 llamarec
USER 10001
ENV PYTHONUNBUFFERED=1
EXPOSE 8001 8002 8080
HEALTHCHECK --start-period=120s --interval=5s CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ready', timeout=3)"]
ENTRYPOINT ["llamarec", "serve", "--health-port", "8080"]
CMD ["--repository", "/models"]
