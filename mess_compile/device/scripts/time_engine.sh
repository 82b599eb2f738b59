# time_engine.sh ENGINE TIMES COMMAND...: time an engine by COMMAND, which writes the file TIMES.
#
# Prints what COMMAND prints, then `ended CODE 0`, then the content of TIMES. An engine that does not run loses its
# hash, so that the next build replaces it.
engine=$1; times=$2; shift 2
rm -f "$times"
"$@" 2>&1; code=$?
[ $code = 0 ] || rm -f "$engine.sha256"
printf '\nended %s 0\n' "$code"
cat "$times"; rm -f "$times"
