#!/bin/sh
# Runs the Rust tests: with cargo-nextest where there is one, else with cargo's own runner. The lab's stories share the
# machine's cores with real guests, so they run one at a time (.config/nextest.toml).
set -eu
if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run --workspace --lib --bins --tests --locked --no-fail-fast
fi
exec cargo test --workspace --lib --bins --tests --locked --no-fail-fast -- --test-threads=1
