# device_state.sh: print temperatures, clocks with their limits, load and power mode, as far as the device has them.
exec 2>/dev/null
for zone in /sys/class/thermal/thermal_zone*; do echo "zone $(cat "$zone/temp") $(cat "$zone/type")"; done
for gpu in /sys/class/devfreq/*; do echo "devfreq $(cat "$gpu/cur_freq") $(cat "$gpu/max_freq") ${gpu##*/}"; done
for cpu in /sys/devices/system/cpu/cpufreq/policy*; do
    echo "policy $(cat "$cpu/scaling_cur_freq") $(cat "$cpu/scaling_max_freq") ${cpu##*policy}"
done
echo "load $(cut -d ' ' -f 1 /proc/loadavg)"
PATH=$PATH:/usr/sbin:/sbin
echo "mode $(nvpmodel -q | sed -n 's/^.*NV Power Mode: *//p')"
