# run_watched.sh PID_FILE COMMAND...: run COMMAND, and stop it and its children when standard input ends.
#
# sshd gives each of its commands a process group. Standard input ends when the other side closes it, exits or is cut
# off; the whole group is stopped then. PID_FILE may be empty. Otherwise a process whose number it holds, left running
# by a connection that froze, is stopped first, and the number of this process is written to it.
file=$1; shift
runs() { tr '\0' '\n' <"/proc/$1/cmdline" | grep -qxF -e "$file"; } 2>/dev/null
if [ -n "$file" ]; then
    mkdir -p -- "$(dirname -- "$file")" || exit 1
    old=$(cat -- "$file" 2>/dev/null); tries=0
    [ -n "$old" ] && runs "$old" && kill -TERM "$old"
    while [ -n "$old" ] && runs "$old"; do
        tries=$((tries + 1)); [ $tries -lt 100 ] || { echo "process $old of an earlier run does not end" >&2; exit 1; }
        sleep 0.1
    done
    echo $$ >"$file" || exit 1
fi
# shellcheck disable=SC2317  # called by the trap
stop() {
    trap '' TERM; kill -TERM 0
    { sleep 5; kill -KILL 0; } >/dev/null 2>&1 &
    wait "$program"; kill -KILL 0
}
trap stop TERM
exec 3<&0
"$@" </dev/null 3<&- &
program=$!
{ while read -r _; do :; done <&3; kill -TERM $$; } >/dev/null 2>&1 &
watcher=$!
wait "$program"; code=$?
kill "$watcher" 2>/dev/null
exit "$code"
