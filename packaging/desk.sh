#!/bin/sh
# Adds the desk to what build.sh made: .deb, .rpm, tarball and SBOM of tallyman-desk, for
# the architecture of this machine alone, because DuckDB is C++ (cgo). Of the libraries
# of this machine only glibc's is needed later, in the version that is then asked for.
#
# The same commit gives the same bytes with the same Go and the same C++ compiler.
#
# usage: desk.sh [-o dist] NFPM CYCLONEDX-GOMOD
set -eu
cd "$(dirname "$0")/.."

out=dist
while getopts o: option; do
	case $option in
	o) out=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
nfpm=$1
sbom=$2
. packaging/version.sh
export CGO_ENABLED=1
arch=$(go env GOHOSTARCH)
files=$out/desk_linux_$arch
mkdir -p "$files"

# libstdc++ goes into the binary: small images have none. DuckDB's package asks for it by -l,
# for which -static-libstdc++ is no answer: a folder that holds the static one alone is.
# libgcc comes with glibc everywhere.
# Its name is the same in each clone, because Go's build id is made of the flags too.
static=.cache/libstdc++
mkdir -p $static
ln -sf "$(g++ -print-file-name=libstdc++.a)" $static/libstdc++.a
go build -trimpath -ldflags "-s -w -linkmode external -extldflags '-L$static' -X main.version=$VERSION -X main.commit=$COMMIT" \
	-o "$files/tallyman-desk" ./cmd/tallyman-desk
glibc=$(objdump -T "$files/tallyman-desk" | grep -o 'GLIBC_[0-9.]*' | sort -u -V | tail -n 1 | cut -d _ -f 2)
[ -n "$glibc" ] || { echo "desk.sh: no version of glibc is in $files/tallyman-desk" >&2; exit 1; }

quietly() { "$@" >"$out/desk.log" 2>&1 || { cat "$out/desk.log" >&2; exit 1; }; rm "$out/desk.log"; }
for packager in deb rpm; do
	PACKAGE_ARCH=$arch PACKAGE_VERSION=$version PACKAGE_FILES=$files PACKAGE_GLIBC=$glibc \
		quietly "$nfpm" package --config packaging/nfpm-desk.yaml --packager $packager --target "$out/"
done
quietly "$sbom" bin -json -noserial -notimestamp -std -version "$version" \
	-output "$out/tallyman-desk_${version}_linux_$arch.cdx.json" "$files/tallyman-desk"
install -m 0644 LICENSE docs/desk.md "$files"
tarball tallyman-desk "tallyman-desk_${version}_linux_$arch.tar.gz" "$files"
sums
