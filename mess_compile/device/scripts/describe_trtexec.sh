# describe_trtexec.sh PROGRAM: print facts of the device, `NAME VALUE` a line; after "trtexec says" what trtexec prints.
#
# /dev/null is not an engine: trtexec prints its version and the GPU, and gives up before anything takes long.
LC_ALL=C; export LC_ALL
program=$(command -v "$1" || command -v trtexec) || exit 127
fact() { echo "$1 $2"; }
fact program "$program"
fact system "$(uname -s) $(uname -m)"
fact cpu "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)"
fact cores "$(nproc)"
fact load_average "$(cut -d ' ' -f 1 /proc/loadavg)"
fact board "$(tr -d '\000' 2>/dev/null </proc/device-tree/model)"
fact release "$(head -n 1 /etc/nv_tegra_release 2>/dev/null)"
id=
for file in /etc/machine-id /var/lib/dbus/machine-id; do [ -n "$id" ] || id=$(cat "$file" 2>/dev/null); done
fact identity "$(printf 'mess-compile %s' "${id:-$(uname -n)}" | sha256sum | cut -c 1-12)"
echo "trtexec says"
"$program" --loadEngine=/dev/null 2>&1
exit 0
