#!/bin/busybox sh
# The power button was pressed: ends what uses the disk, lets go of it and switches off.
export PATH=/bin
echo "pageport: the power button was pressed" >/dev/console
killall pageport-guest
tries=0
while ! umount /data && [ $tries -lt 50 ]; do usleep 100000; tries=$((tries + 1)); done
sync
poweroff -f
