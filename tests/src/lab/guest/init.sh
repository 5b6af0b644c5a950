#!/bin/busybox sh
# First process of the lab's guest: devices, the disk, the address, the helper, the power button, a shell on the serial console.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do insmod "$module"; done
for word in $(cat /proc/cmdline); do
    case "$word" in
        pageport.ip=*) address="${word#pageport.ip=}" ;;
        pageport.control=*) control="/dev/${word#pageport.control=}" ;;
        pageport.heartbeat=*) export PAGEPORT_HEARTBEAT="${word#pageport.heartbeat=}" ;;
    esac
done
ip link set lo up
if [ -n "$address" ] && [ -e /sys/class/net/eth0 ]; then
    ip addr add "$address" broadcast + dev eth0
    ip link set eth0 up
fi
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 50 ]; do usleep 100000; tries=$((tries + 1)); done
mount -t ext4 -o noatime /dev/vda /data || echo "pageport: the disk did not mount" >/dev/console
pageport-guest /data $control &
if [ -x /bin/qemu-ga ]; then
    tries=0
    while [ -z "$port" ] && [ $tries -lt 50 ]; do
        port="$(grep -lx org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name 2>/dev/null)"
        [ -n "$port" ] || usleep 100000
        tries=$((tries + 1))
    done
    port="${port%/name}"
    qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /tmp >/dev/null 2>&1 &
fi
# It looks for input devices once, so it comes after the button's module.
acpid -f -l /dev/null -p /tmp/acpid.pid &
echo "pageport: guest is up" >/dev/console
while true; do setsid cttyhack sh; done
