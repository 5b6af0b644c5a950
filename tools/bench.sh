#!/bin/sh
# Measures, and leaves the figures in target/bench. Ratios within one run count; absolute times depend on the machine.
set -eu
mkdir -p target/bench
echo "bench: the codec alone"
cargo bench --profile dev -p pageport-teleport --bench codec | tee target/bench/codec.txt
echo "bench: one move over the WAN, next to QEMU's own ways"
DEMO_EXIT=1 target/debug/pageport-lab demo
cp target/lab/demo.json target/bench/migration.json
echo "bench: replication, next to qemu-img convert and QEMU's own mirror and backup"
target/debug/pageport-lab bench-replication
echo "bench: three controllers with a large simulated fleet"
target/debug/pageport-lab bench-controller --again
