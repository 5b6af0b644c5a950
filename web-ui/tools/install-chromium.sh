#!/bin/sh
# Installs Debian's chromium for the browser test, if there is none. Needs root.
set -eu
if [ -x "${CHROMIUM:-/usr/bin/chromium}" ]; then exit 0; fi
# apt sometimes loses its shared temporary folder.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium
