# receive_files.sh FOLDER (after verified_folder.sh): unpack a tar stream; print the names of files that arrived whole.
place=incoming-$$
mkdir -p "$place" || exit 1
tar -xo -f - -C "$place"; code=$?
settle "$place"
rm -rf "$place"
exit $code
