#!/bin/sh
# dpkg runs it after the files are gone. Records and an edited configuration stay until
# the package is purged.
set -e
case ${1:-} in
purge)
	rm -rf /etc/tallyman /var/lib/tallyman
	;;
esac
case ${1:-} in
remove | purge)
	# It is of no package, so dpkg takes it away with the last package that has files in it.
	[ -d /opt ] || mkdir -m 0755 /opt
	;;
esac
