# Afterword on CPUs, from the wheel that `make wheel` writes to dist. docs/guides/deploy.md says how to build and run it.

# The Python that the tests are run with.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS install
COPY requirements.txt /wheels/
COPY dist/*.whl /wheels/
# The exact versions of the packages, then the wheel for this architecture. What only builds need is taken out again.
RUN python3 -m venv /opt/afterword \
 && /opt/afterword/bin/python -m pip install --no-cache-dir --require-hashes -r /wheels/requirements.txt \
 && /opt/afterword/bin/python -m pip install --no-cache-dir --no-deps --no-index --find-links /wheels --only-binary :all: afterword \
 && /opt/afterword/bin/python -m pip uninstall --yes editables hatchling \
 && /opt/afterword/bin/python -m pip check

FROM ${BASE}
# What the prebuilt llama.cpp needs of the system.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 libstdc++6 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home afterword \
 && install -d -o afterword -g afterword -m 700 /data \
 && install -d -o afterword -g afterword /models
COPY --from=install /opt/afterword /opt/afterword
# Reachable from outside the container, so it does not start without AFTERWORD_API_KEY, --keys or --allow-open.
ENV PATH="/opt/afterword/bin:${PATH}" \
    AFTERWORD_SERVE_HOST="0.0.0.0" \
    XDG_DATA_HOME="/data" \
    HF_HOME="/models/huggingface"
USER afterword
WORKDIR /models
VOLUME ["/models", "/data"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=5); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["afterword", "serve"]
