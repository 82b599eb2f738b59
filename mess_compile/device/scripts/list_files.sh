# list_files.sh FOLDER (after verified_folder.sh): of the names on standard input, print those whose files are whole.
# Damaged files are removed. Files that a broken transfer left are taken over where they are whole.
for place in incoming-*; do
    [ -d "$place" ] || continue
    settle "$place" >/dev/null
    [ -d "/proc/${place#incoming-}" ] || rm -rf -- "$place"
done
check | while read -r name verdict; do
    if [ "$verdict" = OK ]; then echo "${name%:}"; else rm -f -- "${name%:}"; fi
done
