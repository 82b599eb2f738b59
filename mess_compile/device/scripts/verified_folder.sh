# verified_folder.sh FOLDER: the head of the scripts that keep files in FOLDER by the SHA-256 of their content.
LC_ALL=C; export LC_ALL; trap '' PIPE
command -v sha256sum >/dev/null || { echo "sha256sum: not found" >&2; exit 127; }
mkdir -p -- "$1" && cd -- "$1" || exit 1
# The verdict on each file that is there, of the names on standard input.
check() { while read -r name; do [ ! -f "$name" ] || echo "$name  $name"; done | sha256sum -c 2>/dev/null; }
# Move the files of a folder that have arrived whole to their place, and print their names.
settle() {
    # shellcheck disable=SC2012  # names are hashes
    (cd "$1" && ls | check) | while read -r name verdict; do
        [ "$verdict" != OK ] || { mv -f "$1/${name%:}" "${name%:}" 2>/dev/null && echo "${name%:}"; }
    done
}
