#!/bin/sh
# Licences, sources and duplicate versions of all crates (deny.toml). The advisory database is not a package, so where
# it cannot be fetched only that check is left out, and that is said.
set -eu
if ! cargo deny --version >/dev/null 2>&1; then
    echo "deny: cargo-deny is not installed (cargo install cargo-deny --locked); crates were not checked"
    exit 0
fi
cargo deny --offline check bans licenses sources
cargo deny check advisories || echo "deny: advisories were not checked or have findings (see above)"
