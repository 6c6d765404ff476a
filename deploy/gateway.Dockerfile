# The HTTP gateway alone, without Triton and PyTorch.
#   docker build -f deploy/gateway.Dockerfile -t llamarec-gateway .
#   docker run -p 8090:8090 -e LLAMAREC_GATEWAY_KEYS llamarec-gateway --servers HOST:8001
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
RUN python -m pip install --no-cache-dir -c constraints.txt ./client '.[gateway]' \
    && useradd --create-home --uid 10001 llamarec
USER 10001
ENV PYTHONUNBUFFERED=1
EXPOSE 8090
HEALTHCHECK --start-period=30s --interval=5s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8090/health/ready', timeout=3)"]
ENTRYPOINT ["llamarec", "gateway", "--host", "0.0.0.0"]
