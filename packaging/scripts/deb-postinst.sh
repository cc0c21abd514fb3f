#!/bin/sh
# dpkg runs it after the files are there, after a removal or upgrade that was broken
# off, and when a package brings /usr/bin/docker (the trigger).
set -e
case ${1:-} in
configure | abort-upgrade | abort-remove | abort-deconfigure | triggered)
	/opt/tallyman/bin/tallyman install --from-package
	;;
esac
