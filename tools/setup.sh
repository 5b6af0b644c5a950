#!/bin/sh
# Installs the Debian packages that Pageport's build, tests and demo need. Says what it does; quick when all is there.
#
# QEMU comes from bookworm-backports on Debian 12: version 7.2 corrupts migrated guests under software emulation. The
# package source for it is the machine's own Debian source with another suite, so mirrors stay as they are.
set -eu

packages="build-essential protobuf-compiler busybox-static e2fsprogs zstd iproute2 util-linux strace"
qemu_packages="qemu-system-x86 qemu-utils"
minimum_qemu=9
backports_file=/etc/apt/sources.list.d/pageport-backports.sources

say() { echo "setup: $*"; }

installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'; }

qemu_major() {
    qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.*version \([0-9]*\)\..*/\1/p'
}

missing=""
for package in $packages; do
    installed "$package" || missing="$missing $package"
done
qemu=$(qemu_major)
[ "${qemu:-0}" -ge "$minimum_qemu" ] && command -v qemu-img >/dev/null || missing_qemu=yes
# The guest's kernel is downloaded by name from the package index when it is not cached.
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || missing_index=yes

if [ -z "$missing" ] && [ -z "${missing_qemu:-}" ] && [ -z "${missing_index:-}" ]; then
    say "everything is there (QEMU $qemu)"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    say "missing:$missing ${missing_qemu:+qemu $minimum_qemu or newer} ${missing_index:+the package index}"
    say "run tools/setup.sh as root, or install them yourself"
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    say "this machine has no apt-get; install by hand:$missing $qemu_packages (QEMU $minimum_qemu or newer)"
    exit 1
fi

# apt sometimes loses a shared temporary folder.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT INT TERM
export DEBIAN_FRONTEND=noninteractive

# Writes a copy of the machine's main Debian source with the backports suite.
add_backports() {
    codename=$1
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        # The first stanza that offers the release itself.
        awk -v RS= -v suite="$codename" '$0 ~ "(^|\n)Suites:[^\n]*(^|[ \t])" suite "([ \t\n]|$)" { print; exit }' "$file" |
            sed "/^#/d; s/^Suites:.*/Suites: $codename-backports/" >"$TMPDIR/backports"
        if [ -s "$TMPDIR/backports" ]; then
            cp "$TMPDIR/backports" "$backports_file"
            return 0
        fi
    done
    if [ -e /etc/apt/sources.list ]; then
        awk -v suite="$codename" '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i == suite) { $i = suite "-backports"; print; exit } }' \
            /etc/apt/sources.list >"$TMPDIR/backports"
        if [ -s "$TMPDIR/backports" ]; then
            cp "$TMPDIR/backports" "${backports_file%.sources}.list"
            return 0
        fi
    fi
    say "no Debian source to derive $codename-backports from; add it by hand"
    return 1
}

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
if [ -n "${missing_qemu:-}" ] && [ "$codename" = bookworm ] && ! grep -qrs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
    say "adding the package source bookworm-backports (for QEMU)"
    add_backports "$codename"
fi

say "reading the package index"
apt-get -q update
if [ -n "$missing" ]; then
    say "installing$missing"
    # shellcheck disable=SC2086
    apt-get -q -y --no-install-recommends install $missing
fi
if [ -n "${missing_qemu:-}" ]; then
    say "installing $qemu_packages"
    release=""
    [ "$codename" = bookworm ] && release="-t bookworm-backports"
    # shellcheck disable=SC2086
    apt-get -q -y --no-install-recommends $release install $qemu_packages
    qemu=$(qemu_major)
    if [ "${qemu:-0}" -lt "$minimum_qemu" ]; then
        say "QEMU is still version ${qemu:-unknown}; $minimum_qemu or newer is needed"
        exit 1
    fi
fi
say "done (QEMU $(qemu_major))"
