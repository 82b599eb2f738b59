# list_engines.sh FOLDER: of the keys on standard input, print those whose engines are whole, with their sizes in bytes.
umask 077; mkdir -p -- "$1" && cd -- "$1" || exit 1
# shellcheck disable=SC2012  # stat is not in POSIX
case $(ls -ld .) in
    ?????w*|????????w*) echo "others can write there, and engines are code: run \`chmod go-w $1\` there" >&2; exit 1 ;;
esac
while read -r key; do
    [ -f "$key.engine" ] && [ "$(sha256sum <"$key.engine")" = "$(cat "$key.sha256" 2>/dev/null)  -" ] &&
        echo "$key $(wc -c <"$key.engine")"
done
exit 0
