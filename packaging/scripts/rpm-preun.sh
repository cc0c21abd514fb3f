# shellcheck shell=sh
# $1 is 0 at a removal and 1 at an upgrade, which leaves the shim where it is.
if [ "$1" = 0 ]; then
	/opt/tallyman/bin/tallyman uninstall --from-package
fi
