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

git='git -c safe.directory=*'
: "${VERSION:=$($git describe --tags --always --dirty)}"
: "${COMMIT:=$($git rev-parse --short=12 HEAD)}"
: "${SOURCE_DATE_EPOCH:=$($git log -1 --format=%ct)}"
export SOURCE_DATE_EPOCH CGO_ENABLED=0 LC_ALL=C TZ=UTC
export GOFLAGS=-buildvcs=false
umask 022

# v1.2.3-4-gabc is the fourth commit after 1.2.3. Package managers take no -, and want a
# number in front.
case $VERSION in
v[0-9]* | [0-9]*.[0-9]*) version=$(printf %s "${VERSION#v}" | sed 's/-/+/; s/-/./g') ;;
*) version=0.0.0+$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d).$(printf %s "$VERSION" | tr -- - .) ;;
esac

rm -rf "$out"
mkdir -p "$out"

# tarball NAME FOLDER: the same bytes for the same files, whoever packs them.
tarball() {
	(cd "$2" && find . -mindepth 1 -printf '%P\n' | sort | sed "s,^,./,") |
		tar --create --directory "$2" --no-recursion --files-from - --transform "s,^\.,tallyman-$version," \
			--format ustar --mtime "@$SOURCE_DATE_EPOCH" --owner 0 --group 0 --numeric-owner |
		gzip -n -9 >"$out/$1"
}

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
		tarball "tallyman_${version}_linux_$arch$variant.tar.gz" "$out/linux_$arch$variant"
	done
done
(cd "$out" && sha256sum -- *.*) >"$out.sums"
mv "$out.sums" "$out/SHA256SUMS"
