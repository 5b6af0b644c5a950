#!/bin/sh
# Captures the golden migration streams beside this script from a real QEMU, compressed with zstd.
#
#   paused      a 16 MiB i440fx guest that never ran: one pass, nearly all zero pages
#   booted      a 32 MiB q35 guest that dirties memory meanwhile: several RAM blocks, many passes
#   xbzrle      an unsupported capability: records with flags that the parser does not know
#   bitmaps     an unsupported capability: a second iterable section without a length
#
# Needs qemu-system-x86_64 (>= 9 under tcg) and zstd. Usage: capture.sh [name...]
set -eu

here=$(cd "$(dirname "$0")" && pwd)
qemu=${QEMU:-qemu-system-x86_64}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A boot sector that for ever increments the first byte of each of the 16 pages from 0x20000 on:
#   mov ax,0x2000; mov es,ax; again: xor di,di; next: inc byte [es:di]; add di,0x1000; jnz next; jmp again
printf '\270\000\040\216\300\061\377\046\376\005\201\307\000\020\165\367\353\363' > "$work/disk.raw"
truncate -s 510 "$work/disk.raw"
printf '\125\252' >> "$work/disk.raw"
truncate -s 1M "$work/disk.raw"

# name, seconds that the guest runs before and during the migration, monitor command before it, QEMU arguments
capture() {
    name=$1 before=$2 during=$3 command=$4
    shift 4
    {
        sleep "$before"
        printf '%s\n' "$command" 'migrate_set_parameter max-bandwidth 1M' 'migrate_set_parameter downtime-limit 1'
        printf 'migrate -d "exec:cat > %s"\n' "$work/$name"
        sleep "$during"
        printf '%s\n' 'migrate_set_parameter max-bandwidth 1G' 'migrate_set_parameter downtime-limit 2000'
        sleep 2
        printf '%s\n' 'info migrate' 'quit'
    } | "$qemu" -accel tcg -nodefaults -display none -serial none -monitor stdio "$@" > "$work/$name.log"
    if ! grep -q 'igration status: completed' "$work/$name.log"; then
        echo "$name: the migration did not complete:" >&2
        tail -n 20 "$work/$name.log" >&2
        exit 1
    fi
    zstd -q -19 -f "$work/$name" -o "$here/$name.zst"
    ls -l "$work/$name" "$here/$name.zst"
}

for name in ${*:-paused booted xbzrle bitmaps}; do
    case $name in
        paused) capture paused 0 0 '' -M pc -m 16 -S ;;
        booted)
            capture booted 3 2 '' -M q35 -m 32 -vga std -device virtio-rng-pci \
                -drive "file=$work/disk.raw,format=raw,if=ide"
            ;;
        xbzrle)
            capture xbzrle 3 1.5 'migrate_set_capability xbzrle on' -M pc -m 16 \
                -drive "file=$work/disk.raw,format=raw,if=ide"
            ;;
        bitmaps)
            capture bitmaps 0 0 'migrate_set_capability dirty-bitmaps on' -M pc -m 16 -S \
                -blockdev "driver=file,filename=$work/disk.raw,node-name=disk"
            ;;
        *) echo "$name: no such capture" >&2; exit 2 ;;
    esac
done
