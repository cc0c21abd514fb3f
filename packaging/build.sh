#!/bin/sh
# Builds what is released: .deb, .rpm and tarballs for each architecture, the binaries
# alone for the image's Dockerfile, SBOMs and SHA256SUMS.
#
# The same commit gives the same bytes, on any machine with the same Go: paths are
# trimmed, and every time is that of the commit. Outside of a git repository set
# VERSION, COMMIT and SOURCE_DATE_EPOCH.
#
# usage: build.sh [-a "amd64 arm64"] [-o dist] NFPM CYCLONEDX-GOMOD
set -eu
cd "$(dirname "$0")/.."

architectures='amd64 arm64'
out=dist
while getopts a:o: option; do
	case $option in
	a) architectures=$OPTARG ;;
	o) out=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
nfpm=$1
sbom=$2

. packaging/version.sh
export CGO_ENABLED=0

rm -rf "$out"
mkdir -p "$out"

for arch in $architectures; do
	files=$out/linux_$arch
	slim=$out/linux_${arch}_slim
	mkdir -p "$files" "$slim"
	flags="-s -w -X main.version=$VERSION -X main.commit=$COMMIT"
	GOARCH='' GOOS='' go build -o "$out/leanbuild" ./internal/leanbuild
	export GOOS=linux GOARCH="$arch"
	"$out/leanbuild" -o "$files/docker-shim" ./cmd/docker-shim
	go build -trimpath -ldflags "$flags" -o "$files/tallyman" ./cmd/tallyman
	go build -trimpath -tags slim -ldflags "$flags" -o "$slim/tallyman" ./cmd/tallyman
	unset GOOS GOARCH
	rm "$out/leanbuild"
	install -m 0755 runner-image/hooks/job-started.sh runner-image/hooks/job-completed.sh "$files"
	install -m 0755 "$files/docker-shim" "$files/job-started.sh" "$files/job-completed.sh" "$slim"

	for packager in deb rpm; do
		PACKAGE_ARCH=$arch PACKAGE_VERSION=$version PACKAGE_FILES=$files \
			"$nfpm" package --config packaging/nfpm.yaml --packager $packager --target "$out/" >"$out/nfpm.log" || { cat "$out/nfpm.log" >&2; exit 1; }
		rm "$out/nfpm.log"
	done
	for variant in "" _slim; do
		"$sbom" bin -json -noserial -notimestamp -std -version "$version" \
			-output "$out/tallyman_${version}_linux_$arch$variant.cdx.json" "$out/linux_$arch$variant/tallyman" 2>"$out/nfpm.log" || { cat "$out/nfpm.log" >&2; exit 1; }
		rm "$out/nfpm.log"
		install -m 0644 LICENSE README.md "$out/linux_$arch$variant"
		tarball tallyman "tallyman_${version}_linux_$arch$variant.tar.gz" "$out/linux_$arch$variant"
	done
done
sums
