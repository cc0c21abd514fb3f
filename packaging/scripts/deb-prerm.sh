#!/bin/sh
# dpkg runs it before the files go. An upgrade leaves the shim where it is: the new
# version's postinst renews it, and until then the old one works.
set -e
case ${1:-} in
remove | deconfigure)
	if [ ! -x /opt/tallyman/bin/tallyman ]; then
		echo "tallyman: /opt/tallyman/bin/tallyman is gone, so docker cannot be put back: apt-get install --reinstall tallyman, and remove it then" >&2
		exit 1
	fi
	/opt/tallyman/bin/tallyman uninstall --from-package
	;;
esac
