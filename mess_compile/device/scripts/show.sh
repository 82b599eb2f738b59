# show.sh FILE: print FILE; exit code 44 when there is none.
[ -e "$1" ] || exit 44
cat <"$1"; exit $?
