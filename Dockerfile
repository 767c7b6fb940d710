# Afterword on CPUs. docs/guides/deploy.md says how to build and run it.

# The Python that the tests are run with.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# Any x86-64 processor with AVX2, not only the one that builds; on ARM the baseline of its own.
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
COPY requirements.txt requirements-native.txt ./
RUN CMAKE_ARGS="${CMAKE_ARGS}" python3 -m pip wheel --no-cache-dir --require-hashes --wheel-dir wheels -r requirements.txt -r requirements-native.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
# Empty: kernels for each level of instructions. Else options for one processor, such as -march=native.
ARG CXXFLAGS=""
RUN if [ -z "${CXXFLAGS}" ]; then unset CXXFLAGS; fi \
 && python3 -m pip wheel --no-cache-dir --no-index --find-links wheels --no-deps --wheel-dir wheels . \
 && python3 -m venv /opt/afterword \
 && /opt/afterword/bin/python -m pip install --no-cache-dir --no-index --find-links wheels "afterword[native]" \
 && /opt/afterword/bin/python -m pip uninstall --yes xllamacpp

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home afterword \
 && install -d -o afterword -g afterword -m 700 /data \
 && install -d -o afterword -g afterword /models
COPY --from=build /opt/afterword /opt/afterword
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
