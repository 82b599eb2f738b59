# write.sh FILE: write standard input to FILE, all of it or nothing.
mkdir -p -- "$(dirname -- "$1")" && cat >"$1.new" && mv -f -- "$1.new" "$1"
