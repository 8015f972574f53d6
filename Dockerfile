# Molehunt with its server, on a CPU. Build it from the root of a clone:
#
#   docker build --build-arg COMMIT="$(git rev-parse --short=8 HEAD)" --tag molehunt .
#   docker run --rm --volume "$PWD:/audit" molehunt demo
#
# TORCH_INDEX names an index of CPU builds of torch. Without it the default index gives a CUDA build of several GB, which also works.
# The tests run these RUN commands as a script (tests/package/test_dockerfile.py), so every path in them is relative.
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY pyproject.toml setup.py MANIFEST.in README.md CHANGELOG.md LICENSE constraints.txt ./
COPY src src
ARG COMMIT=""
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && MOLEHUNT_COMMIT="$COMMIT" pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels .

FROM python:3.11-slim-bookworm
WORKDIR /install
COPY --from=build /build/wheels wheels
COPY constraints.txt ./
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt "$(echo wheels/*.whl)[serve]"

WORKDIR /audit
RUN chown 1000:1000 .
# The home is where the hub's cache goes; mount a folder there to keep it.
ENV HOME=/audit
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["molehunt"]
CMD ["--help"]
