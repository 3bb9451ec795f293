# syntax=docker/dockerfile:1
# The worker, with a CPU build of torch. For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/driftkeel
ENV PATH=/opt/driftkeel/bin:$PATH
# Dependencies change less often than the code: they are layers of their own.
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" --no-deps "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY meta meta
COPY monitoring monitoring
COPY worker worker
COPY driftkeel.example.yaml ./
COPY bundles/fashion-mnist bundles/fashion-mnist
COPY deploy deploy
RUN pip install --constraint constraints.txt '.[console]'

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="driftkeel" \
      org.opencontainers.image.description="Keeps image classifiers on course while their cameras drift" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin driftkeel
COPY --from=build /opt/driftkeel /opt/driftkeel
COPY bundles/fashion-mnist /opt/bundles/fashion-mnist
ENV PATH=/opt/driftkeel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=passive \
    DRIFTKEEL__METRICS__HOST=0.0.0.0
# The default of bundle.path is relative: bundles/fashion-mnist. A variable would go before every configuration file.
WORKDIR /opt
USER 10001
EXPOSE 9464
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9464/healthz', timeout=4)"]
# Exec form: the worker is process 1 and gets SIGTERM itself.
ENTRYPOINT ["driftkeel"]
CMD ["worker"]
