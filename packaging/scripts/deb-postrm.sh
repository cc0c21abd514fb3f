#!/bin/sh
# dpkg runs it after the files are gone. Records and an edited configuration stay until
# the package is purged.
set -e
case ${1:-} in
purge)
	rm -rf /etc/tallyman /var/lib/tallyman
	;;
esac
