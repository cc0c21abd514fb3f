# shellcheck shell=sh disable=SC2034,SC2154
# Read by build.sh and desk.sh: the version by its names, and what both do alike. It wants
# $out, the folder for what is made.
git='git -c safe.directory=*'
: "${VERSION:=$($git describe --tags --always --dirty)}"
: "${COMMIT:=$($git rev-parse --short=12 HEAD)}"
: "${SOURCE_DATE_EPOCH:=$($git log -1 --format=%ct)}"
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
export GOFLAGS=-buildvcs=false
umask 022

# v1.2.3-4-gabc is the fourth commit after 1.2.3. Package managers take no -, and want a
# number in front.
case $VERSION in
v[0-9]* | [0-9]*.[0-9]*) version=$(printf %s "${VERSION#v}" | sed 's/-/+/; s/-/./g') ;;
*) version=0.0.0+$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d).$(printf %s "$VERSION" | tr -- - .) ;;
esac

# tarball PROGRAM NAME FOLDER: the same bytes for the same files, whoever packs them.
tarball() {
	(cd "$3" && find . -mindepth 1 -printf '%P\n' | sort | sed "s,^,./,") |
		tar --create --directory "$3" --no-recursion --files-from - --transform "s,^\.,$1-$version," \
			--format ustar --mtime "@$SOURCE_DATE_EPOCH" --owner 0 --group 0 --numeric-owner |
		gzip -n -9 >"$out/$2"
}

# sums names all that is released in SHA256SUMS.
sums() {
	(cd "$out" && sha256sum -- *.*) >"$out.sums"
	mv "$out.sums" "$out/SHA256SUMS"
}
