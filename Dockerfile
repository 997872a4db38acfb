# docker build --build-arg TRUSTGATE_COMMIT="$(git rev-parse --short HEAD)" --tag trustgate .
# docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:9180:9180 -v trustgate:/var/lib/trustgate trustgate

# Debian 12 in both stages: the binary is linked against the glibc that it will find.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# For `trustgate --version`. Given from outside, as there is no .git in the build context.
ARG TRUSTGATE_COMMIT=unknown
# The caches outlive the layer, so a changed line does not rebuild every dependency; target/ is one of them, which is why
# the binary is moved out in the same step. The empty directory becomes the state directory below: the next stage has no
# shell to make one.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin trustgate \
    && install -D target/release/trustgate /out/trustgate \
    && install -d -m 0700 /out/state

# No shell and no package manager; CA certificates for TLS to the database and Redis.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG TRUSTGATE_COMMIT=unknown
LABEL org.opencontainers.image.title="trustgate" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${TRUSTGATE_COMMIT}"
COPY --from=build /out/trustgate /usr/local/bin/trustgate
# A named volume mounted here takes over the owner.
COPY --from=build --chown=65532:65532 /out/state/ /var/lib/trustgate/
# In a container the loopback address would be reachable by nobody. The environment wins over a configuration file: to
# listen elsewhere, set these.
ENV TRUSTGATE__GRPC__LISTEN=0.0.0.0:50051 \
    TRUSTGATE__ADMIN__LISTEN=0.0.0.0:9180 \
    STATE_DIRECTORY=/var/lib/trustgate
EXPOSE 50051 9180
# In numbers, so that the kubelet can tell that it is not root.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/trustgate"]
CMD ["serve"]
