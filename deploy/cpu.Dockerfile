# A slim image for development without a GPU. The wheel's tritonserver (core 24.10) predates the HTTP security fixes of
# August 2025, so HTTP stays on the container's loopback interface.
#   docker build -f deploy/cpu.Dockerfile -t llamarec:cpu .
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON}

WORKDIR /opt/llamarec
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY client client
COPY preprocessing preprocessing
COPY models models
COPY export export
COPY serving serving
COPY stores stores
COPY llamarec llamarec
COPY model_repository model_repository
RUN python -m pip install --no-cache-dir -c constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu ./client '.[serve,server]' \
    && useradd --create-home --uid 10001 llamarec
USER 10001
ENV PYTHONUNBUFFERED=1
EXPOSE 8001 8002 8080
HEALTHCHECK --start-period=120s --interval=5s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ready', timeout=3)"]
ENTRYPOINT ["llamarec", "serve", "--health-port", "8080"]
CMD ["--repository", "/models"]
