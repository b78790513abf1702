//! Plain reads and writes of regions.

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_offload::Store;
use half::bf16;
use proptest::prelude::*;

use crate::support::{folders, numbers, store, ways};

#[test]
fn fresh_regions_are_zero_and_whole_regions_come_back() {
    for folder in folders() {
        for options in ways() {
            let lens = [0, 1, 1023, 1024, 1025, 3_000_001];
            let bytes = lens.iter().map(|len| Store::bytes_of(*len, DType::F32)).sum();
            let Some(store) = store(folder.path(), bytes, &options) else { continue };
            let regions = lens.map(|len| store.allocate(len, DType::F32).unwrap());

            for (seed, region) in regions.iter().enumerate() {
                let mut read = vec![1.0; region.len()];
                store.read(region, SpanMut::from(&mut read[..])).unwrap();
                assert!(read.iter().all(|x| *x == 0.0), "{options:?}");
                store.write(region, Span::from(&numbers(region.len(), seed)[..])).unwrap();
            }
            for (seed, region) in regions.iter().enumerate() {
                let mut read = vec![0.0; region.len()];
                store.read(region, SpanMut::from(&mut read[..])).unwrap();
                assert_eq!(read, numbers(region.len(), seed), "{options:?}");
            }
        }
    }
}

#[test]
fn half_precision_comes_back() {
    for folder in folders() {
        for options in ways() {
            let Some(store) = store(folder.path(), Store::bytes_of(5001, DType::BF16), &options) else {
                continue;
            };
            let region = store.allocate(5001, DType::BF16).unwrap();
            let numbers: Vec<bf16> = numbers(5001, 3).into_iter().map(bf16::from_f32).collect();
            store.write(&region, Span::from(&numbers[..])).unwrap();
            let mut read = vec![bf16::ZERO; 5001];
            store.read(&region, SpanMut::from(&mut read[..])).unwrap();
            assert_eq!(read, numbers);
        }
    }
}

/// Writes and reads of parts of two neighbouring regions.
#[derive(Clone, Debug)]
enum Step {
    Write { region: usize, range: (usize, usize), seed: usize },
    Read { region: usize, range: (usize, usize) },
}

const LEN: usize = 7000;

fn step() -> impl Strategy<Value = Step> {
    let range = (0..=LEN, 0..=LEN).prop_map(|(a, b)| (a.min(b), a.max(b)));
    // Page ends and region ends are where mistakes live.
    let edge = prop::sample::select(vec![0, 1, 1023, 1024, 1025, 2048, 6143, 6144, 6145, 6999, LEN]);
    let edges = (edge.clone(), edge).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let range = prop_oneof![range, edges];
    prop_oneof![
        (0..2usize, range.clone(), 0..100usize).prop_map(|(region, range, seed)| Step::Write {
            region,
            range,
            seed
        }),
        (0..2usize, range).prop_map(|(region, range)| Step::Read { region, range }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn parts_are_read_and_written_as_in_memory(steps in prop::collection::vec(step(), 1..8)) {
        for folder in folders() {
            for options in ways() {
                let Some(store) = store(folder.path(), 2 * Store::bytes_of(LEN, DType::F32), &options) else { continue };
                let regions = [(); 2].map(|()| store.allocate(LEN, DType::F32).unwrap());
                let mut memory = [vec![0f32; LEN], vec![0f32; LEN]];
                for step in &steps {
                    match *step {
                        Step::Write { region, range: (start, end), seed } => {
                            let numbers = numbers(end - start, seed);
                            store.write_at(&regions[region], start, Span::from(&numbers[..])).unwrap();
                            memory[region][start..end].copy_from_slice(&numbers);
                        }
                        Step::Read { region, range: (start, end) } => {
                            let mut read = vec![f32::NAN; end - start];
                            store.read_at(&regions[region], start, SpanMut::from(&mut read[..])).unwrap();
                            prop_assert_eq!(&read[..], &memory[region][start..end]);
                        }
                    }
                }
                for (region, memory) in regions.iter().zip(&memory) {
                    let mut read = vec![f32::NAN; LEN];
                    store.read(region, SpanMut::from(&mut read[..])).unwrap();
                    prop_assert_eq!(&read, memory);
                }
            }
        }
    }
}

#[test]
fn memory_that_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let options = &ways()[0];
    let Some(store) = store(folder.path(), 3 * 4096, options) else { return };
    let region = store.allocate(1500, DType::F32).unwrap();
    let message = |result: deepspeed_offload::Result<()>| result.unwrap_err().to_string();

    assert_eq!(
        message(store.write(&region, Span::from(&[0f32; 3][..]))),
        "Store::write: memory for 3 elements, but the region has 1500"
    );
    assert_eq!(
        message(store.read_at(&region, 1400, SpanMut::from(&mut [0f32; 101][..]))),
        "Store::read_at: 101 elements from 1400 on of a region of 1500"
    );
    assert_eq!(
        message(store.write(&region, Span::from(&[bf16::ZERO; 1500][..]))),
        "Store::write_at: bf16 memory for a region of fp32"
    );
    let other = Store::create(folder.path(), 0, options).unwrap().allocate(0, DType::F32).unwrap();
    assert_eq!(
        message(store.write(&other, Span::from(&[0f32; 0][..]))),
        "Store::write_at: the region belongs to another store"
    );
    assert_eq!(
        store.allocate(1025, DType::F32).unwrap_err().to_string(),
        format!(
            "a region of 8192 bytes does not fit: 8192 of the 12288 bytes reserved in {} are taken",
            folder.path().display()
        )
    );
}
