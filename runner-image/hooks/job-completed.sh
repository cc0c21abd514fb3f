#!/bin/sh
# Tallyman: runs after the last step of each job.
#
# Name it in ACTIONS_RUNNER_HOOK_JOB_COMPLETED (in the image or the pod: the runner
# reads it from its own environment), or copy it into /etc/arc/hooks/job-completed.d.
# The runner starts it as `bash -e <path>`, or with sh where there is no bash, and
# fails the job when it does not exit 0. Nothing of ours can make it do that.
#
# A hook that was there before goes on working: name it in chain_completed in
# /etc/tallyman/tallyman.conf, or in TALLYMAN_CHAIN_JOB_COMPLETED. It runs first, so
# that its docker calls are accounted to the job; its output and its exit code are
# its own: a chained hook that fails, or is missing, fails the job as it did without us.
#
# Everything but tallyman, timeout and the chained hook is built into the shell, so
# that a missing PATH, a full disk or a broken tool stops nothing.
code=0
trap 'exit "${code:-0}"' EXIT || :
trap : INT TERM HUP || :
set +e || :

# A job can put directories in front of PATH, so PATH comes last.
tallyman=
for file in "${TALLYMAN_BIN:-}" /usr/local/bin/tallyman /usr/bin/tallyman /opt/tallyman/bin/tallyman; do
	if [ -f "$file" ] && [ -x "$file" ]; then
		tallyman=$file
		break
	fi
done
[ -n "$tallyman" ] || tallyman=$(command -v tallyman) || tallyman=

# The configuration is looked for where tallyman looks: beside the binary first, which
# may be called by a link.
beside=$tallyman
for file in /usr/bin/readlink /bin/readlink; do
	if [ -L "$tallyman" ] && [ -x "$file" ]; then
		beside=$("$file" -f "$tallyman") || beside=$tallyman
		break
	fi
done
chain=${TALLYMAN_CHAIN_JOB_COMPLETED:-}
for conf in "${TALLYMAN_CONFIG:-}" "${beside%/*}/tallyman.conf" /etc/tallyman/tallyman.conf; do
	if [ -n "$chain" ] || [ ! -f "$conf" ] || [ ! -r "$conf" ]; then
		continue
	fi
	while read -r line || [ -n "$line" ]; do
		key=${line%%=*}
		value=${line#"$key"}
		if [ "${key%"${key##*[![:space:]]}"}" = chain_completed ]; then
			value=${value#=}
			value=${value#"${value%%[![:space:]]*}"}
			chain=${value%"${value##*[![:space:]]}"} # the end too: the file may have Windows line ends
		fi
	done <"$conf" 2>/dev/null
	break
done
case $chain in
/*) ;;
*) chain= ;; # the working directory is the job's
esac

# The runner starts .sh and .ps1 in this way (actions/runner, ScriptHandlerHelpers.cs).
# TALLYMAN_CHAINED: a hook that was told to chain itself does so once.
if [ -n "$chain" ] && [ -z "${TALLYMAN_CHAINED:-}" ]; then
	case $chain in
	*.sh) TALLYMAN_CHAINED=1 "${BASH:-/bin/sh}" -e "$chain" || code=$? ;;
	*.ps1) TALLYMAN_CHAINED=1 pwsh -command ". '$chain'" || code=$? ;;
	*) TALLYMAN_CHAINED=1 "$chain" || code=$? ;;
	esac
fi

# Tallyman bounds itself to 3 s; this is for a binary that does not even start.
limit=
for file in /usr/bin/timeout /bin/timeout; do
	if [ -x "$file" ]; then
		limit="$file 5"
		break
	fi
done

if [ -n "$tallyman" ]; then
	# shellcheck disable=SC2086 # two words, or none
	$limit "$tallyman" hook job-completed </dev/null 2>/dev/null || :
fi
exit "$code"
