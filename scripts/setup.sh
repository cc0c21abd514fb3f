#!/bin/sh
# Installs what the demo and the tests need besides Go. It is quiet when nothing is
# missing, installs with apt where it may (Debian or Ubuntu, as root or with a sudo
# that asks no password), and otherwise says what is missing and how to get it. It does not fail for want
# of rights: the demo and the tests name what they cannot do without.
#
# usage: setup.sh command:package...
set -eu

# have is true when the command is there and usable.
have() {
	# Ubuntu packages no browser that runs without snapd; its machines often have Chrome.
	[ "$1" != chromium ] || ! command -v google-chrome >/dev/null || return 0
	path=$(PATH="$PATH:/usr/sbin:/sbin" command -v "$1") || return 1
	# An image FROM scratch needs a busybox without a loader; Ubuntu also ships a dynamic one.
	[ "$1" != busybox ] || ! ldd "$path" >/dev/null 2>&1
}

set_missing() {
	missing=
	for pair; do
		have "${pair%%:*}" && continue
		case " $missing " in *" ${pair#*:} "*) ;; *) missing="$missing ${pair#*:}" ;; esac
	done
	missing=${missing# }
}

set_missing "$@"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "setup: missing (Debian's names): $missing; please install them with this machine's package manager" >&2
	exit 0
fi
sudo=
if [ "$(id -u)" != 0 ]; then
	sudo='sudo -n env DEBIAN_FRONTEND=noninteractive'
fi
if [ -n "$sudo" ] && ! sudo -n true 2>/dev/null; then
	echo "setup: missing: $missing; to install them: sudo apt-get install $missing" >&2
	exit 0
fi

install_missing() {
	packages=$missing
	# From Debian 13 on, docker.io no longer brings the command line client.
	if apt-cache show docker-cli >/dev/null 2>&1; then
		case " $missing " in *" docker.io "*) packages="$missing docker-cli" ;; esac
	fi
	# shellcheck disable=SC2086 # lists of words are meant
	$sudo apt-get install -y -q --no-install-recommends $packages
}

echo "setup: installing $missing" >&2
export DEBIAN_FRONTEND=noninteractive
# A fresh machine has no package lists, and a stale one lists packages that are gone:
# one update and one more try cover both.
install_missing >/dev/null 2>&1 && exit 0
# shellcheck disable=SC2086
$sudo apt-get update -q >/dev/null || true
install_missing >&2 || {
	echo "setup: apt-get could not install: $missing" >&2
	exit 1
}
