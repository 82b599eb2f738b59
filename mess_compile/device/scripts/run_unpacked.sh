# run_unpacked.sh PYTHON PROGRAM ACTION: unpack a tar stream to a temporary folder, and run its program.zip there.
folder=$(mktemp -d) && tar -xof - -C "$folder" && "$1" "$folder/program.zip" "$2" "$3" "$folder/request"
code=$?; rm -rf "$folder"; exit $code
