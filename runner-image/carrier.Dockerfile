# Only our files, for an init container that brings them to a runner image which is not
# ours (arc/values-init-container.yaml). The context is what `make packages` makes:
#
#   docker buildx build --platform linux/amd64,linux/arm64 -f runner-image/carrier.Dockerfile dist
FROM scratch

ARG TARGETARCH
ARG VARIANT=

COPY linux_${TARGETARCH}${VARIANT}/tallyman linux_${TARGETARCH}${VARIANT}/docker-shim /opt/tallyman/bin/

# Root, because it gives the folder for records to the runner's user.
USER 0:0
ENTRYPOINT ["/opt/tallyman/bin/tallyman"]
CMD ["carry", "--to", "/tallyman", "--state", "/state"]
