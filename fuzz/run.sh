#!/bin/sh
# Fuzzes one target with libFuzzer on the stable toolchain, as `cargo fuzz run TARGET --sanitizer none` does.
#   fuzz/run.sh TARGET [SECONDS]
# What libFuzzer finds new stays out of the committed corpus: copy what is worth keeping.
set -eu
cd "$(dirname "$0")"
target=$1
found=target/found/$target
# Named, so that the flags do not reach build scripts.
host=$(rustc -vV | sed -n "s/^host: //p")
mkdir -p "$found" artifacts
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks" \
    CARGO_TARGET_DIR=target cargo build --release --quiet --target "$host" --bin "$target"
exec "target/$host/release/$target" -max_total_time="${2:-60}" -rss_limit_mb=1024 -malloc_limit_mb=160 -timeout=10 \
    -artifact_prefix=artifacts/ "$found" "corpus/$target"
