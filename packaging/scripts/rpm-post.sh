# shellcheck shell=sh
# $1 is 1 at an installation and 2 at an upgrade. A failing scriptlet leaves the package
# installed: rpm only says so.
/opt/tallyman/bin/tallyman install --from-package
