#!/bin/sh
# Captures the golden migration streams beside this script from a real QEMU, compressed with zstd.
#
#   paused      a 16 MiB i440fx guest that never ran: one pass, nearly all zero pages
#   booted      a 32 MiB q35 guest that runs its firmware meanwhile: several RAM blocks, more than one pass
#   xbzrle      an unsupported capability: flags that the parser does not know
#   multifd     an unsupported capability: pages leave on other channels
#   bitmaps     an unsupported capability: a second iterable section without a length
#
# Needs qemu-system-x86_64 (>= 9 under tcg) and zstd. Usage: capture.sh [name...]
set -eu

here=$(cd "$(dirname "$0")" && pwd)
qemu=${QEMU:-qemu-system-x86_64}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# name, seconds that the guest runs before the migration, monitor commands before it, QEMU arguments
capture() {
    name=$1 seconds=$2 commands=$3
    shift 3
    {
        sleep "$seconds"
        printf '%s\n' "$commands" 'migrate_set_parameter max-bandwidth 1G'
        printf 'migrate "exec:cat > %s"\n' "$work/$name"
        printf 'quit\n'
    } | "$qemu" -accel tcg -nodefaults -display none -serial none -monitor stdio "$@" > "$work/$name.log"
    if [ ! -s "$work/$name" ]; then
        echo "$name: QEMU wrote no stream:" >&2
        cat "$work/$name.log" >&2
        exit 1
    fi
    zstd -q -19 -f "$work/$name" -o "$here/$name.zst"
    ls -l "$here/$name.zst"
}

for name in ${*:-paused booted xbzrle multifd bitmaps}; do
    case $name in
        paused) capture paused 0 '' -M pc -m 16 -S ;;
        booted) capture booted 3 '' -M q35 -m 32 -vga std -device virtio-rng-pci -boot menu=on ;;
        xbzrle)
            capture xbzrle 2 'migrate_set_capability xbzrle on' -M pc -m 16 -vga std -boot menu=on
            ;;
        multifd)
            # The channels need a socket; the main one is kept, the page channels are drained.
            echo "multifd: see multifd.sh" >&2
            ;;
        bitmaps)
            truncate -s 1M "$work/disk.raw"
            capture bitmaps 0 'migrate_set_capability dirty-bitmaps on' -M pc -m 16 -S \
                -blockdev "driver=file,filename=$work/disk.raw,node-name=disk"
            ;;
        *) echo "$name: no such capture" >&2; exit 2 ;;
    esac
done
