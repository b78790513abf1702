//! Memory throughput of the kernels on one thread, beside a copy and a read-modify-write of plain memory.
//!
//! `cargo bench -p deepspeed-kernels`; arrays are far larger than caches. Throughput counts each byte that has to be
//! read and each that has to be written, so a copy of N bytes counts 2 N. Set `DS_BENCH_ELEMENTS` for another
//! number of elements than 50 million, which take 1 GB.

use std::{hint::black_box, time::Duration};

use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use deepspeed_core::{AlignedBuffer, DType};
use deepspeed_kernels::{
    Isa, cast_on, reduce_ranks_on, scale_in_place_on, sum_squares_on,
    update::{AdamCoefficients, adam_on},
};

/// Number of elements of each array.
fn elements() -> usize {
    std::env::var("DS_BENCH_ELEMENTS").map_or(50_000_000, |text| text.parse().expect("DS_BENCH_ELEMENTS"))
}

/// A buffer whose pages are all present.
fn buffer(len: usize, dtype: DType, value: f32) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::zeroed(len, dtype);
    let values: Vec<f32> = (0..1 << 16).map(|i| value * (1.0 + (i % 97) as f32 / 97.0)).collect();
    for start in (0..len).step_by(values.len()) {
        let count = values.len().min(len - start);
        cast_on(Isa::active(), values[..count].into(), buffer.span_mut().slice_mut(start, count));
    }
    buffer
}

fn group<'a>(criterion: &'a mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes((bytes * elements()) as u64));
    group.sample_size(10).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    group
}

fn memory(criterion: &mut Criterion) {
    let len = elements();
    let (src, mut dst) = (buffer(len, DType::F32, 1.0), buffer(len, DType::F32, 2.0));
    let mut group = group(criterion, "memory", 8);
    group.bench_function("copy", |bencher| {
        bencher.iter(|| black_box(&mut dst).as_f32_mut().copy_from_slice(black_box(&src).as_f32()));
    });
    group.bench_function("read-modify-write", |bencher| {
        bencher.iter(|| scale_in_place_on(Isa::active(), black_box(&mut dst).as_f32_mut(), 1.0));
    });
}

/// 28 bytes a parameter in fp32, and 2 for the model's copy.
fn adam(criterion: &mut Criterion) {
    let len = elements();
    let (mut param, grad) = (buffer(len, DType::F32, 1.0), buffer(len, DType::F32, 1e-3));
    let (mut exp_avg, mut exp_avg_sq) = (buffer(len, DType::F32, 1e-3), buffer(len, DType::F32, 1e-6));
    let mut out = buffer(len, DType::BF16, 1.0);
    let coefficients = AdamCoefficients::new(1e-3, (0.9, 0.999), 1e-8, 0.01, true, true, 10);
    for (name, bytes, cast) in [("adam fp32", 28, false), ("adam fp32 to bf16", 30, true)] {
        let mut group = group(criterion, name, bytes);
        for isa in Isa::supported() {
            group.bench_function(isa.name(), |bencher| {
                bencher.iter(|| {
                    adam_on(
                        isa,
                        param.as_f32_mut(),
                        grad.span(),
                        0.5,
                        exp_avg.as_f32_mut(),
                        exp_avg_sq.as_f32_mut(),
                        &coefficients,
                        cast.then(|| out.span_mut()),
                    );
                });
            });
        }
    }
}

/// Two bf16 gradients read, one fp32 shard written.
fn reduce(criterion: &mut Criterion) {
    let len = elements();
    let (a, b) = (buffer(len, DType::BF16, 1.0), buffer(len, DType::BF16, 2.0));
    let mut shard = buffer(len, DType::F32, 0.0);
    let mut group = group(criterion, "reduce two bf16 ranks", 8);
    for isa in Isa::supported() {
        group.bench_function(isa.name(), |bencher| {
            bencher.iter(|| reduce_ranks_on(isa, &[a.span(), b.span()], 0.5, shard.as_f32_mut(), false));
        });
    }
}

fn casts(criterion: &mut Criterion) {
    let len = elements();
    let mut wide = buffer(len, DType::F32, 1.0);
    for dtype in [DType::BF16, DType::F16] {
        let mut narrow = buffer(len, dtype, 1.0);
        let mut group = group(criterion, &format!("cast {dtype}"), 6);
        for isa in Isa::supported() {
            group.bench_function(format!("narrow/{}", isa.name()), |bencher| {
                bencher.iter(|| cast_on(isa, wide.span(), narrow.span_mut()));
            });
            group.bench_function(format!("widen/{}", isa.name()), |bencher| {
                bencher.iter(|| cast_on(isa, narrow.span(), wide.span_mut()));
            });
        }
    }
    let mut group = group(criterion, "sum of squares", 4);
    for isa in Isa::supported() {
        group.bench_function(isa.name(), |bencher| bencher.iter(|| sum_squares_on(isa, wide.span())));
    }
}

criterion_group!(benches, memory, adam, reduce, casts);
criterion_main!(benches);
