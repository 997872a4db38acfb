# docker build --build-arg TRUSTGATE_COMMIT="$(git rev-parse --short HEAD)" --tag trustgate .
# docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:9180:9180 -v trustgate:/var/lib/trustgate trustgate

# Both stages use Debian 12, so that the build links against the same glibc as the final image has.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# For `trustgate --version`. The caller passes the commit, because the build context has no .git directory.
ARG TRUSTGATE_COMMIT=unknown
# Cargo's registry and target/ are cache mounts, so a changed source line does not rebuild the dependencies. A cache
# mount is not part of the layer, so this step also copies the binary out of target/. The empty directory becomes the
# state directory below, because the next stage has no shell to create one.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin trustgate \
    && install -D target/release/trustgate /out/trustgate \
    && install -d -m 0700 /out/state

# This image has no shell and no package manager. It has CA certificates for TLS to the database and to Redis.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG TRUSTGATE_COMMIT=unknown
LABEL org.opencontainers.image.title="trustgate" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${TRUSTGATE_COMMIT}"
COPY --from=build /out/trustgate /usr/local/bin/trustgate
# A new named volume that is mounted here gets the owner of this directory.
COPY --from=build --chown=65532:65532 /out/state/ /var/lib/trustgate/
# Other containers cannot reach the loopback address of a container. The environment overrides a configuration file: to
# listen on other addresses, set these variables.
ENV TRUSTGATE__GRPC__LISTEN=0.0.0.0:50051 \
    TRUSTGATE__ADMIN__LISTEN=0.0.0.0:9180 \
    STATE_DIRECTORY=/var/lib/trustgate
EXPOSE 50051 9180
# Numeric ids, so that the kubelet can verify that the user is not root.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/trustgate"]
CMD ["serve"]
