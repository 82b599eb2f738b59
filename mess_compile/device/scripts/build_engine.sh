# build_engine.sh ENGINE NEW CACHE NEW_CACHE COMMAND...: build an engine by COMMAND, which writes NEW and NEW_CACHE.
#
# Prints what COMMAND prints, then `ended CODE BYTES`. The engine becomes ENGINE.engine with ENGINE.sha256 when COMMAND
# succeeds; otherwise everything is as it was before.
engine=$1; new=$2; cache=$3; new_cache=$4; shift 4
rm -f "$new" "$new_cache"; [ ! -f "$cache" ] || cp "$cache" "$new_cache" || exit 1
"$@" 2>&1; code=$?
if [ $code = 0 ]; then
    hash=$(sha256sum <"$new") && echo "${hash%% *}" >"$engine.sha256" && mv -f "$new" "$engine.engine" || exit 1
    [ ! -f "$new_cache" ] || mv -f "$new_cache" "$cache"
    printf '\nended 0 %s\n' "$(wc -c <"$engine.engine")"
else
    rm -f "$new" "$new_cache"
    printf '\nended %s 0\n' "$code"
fi
