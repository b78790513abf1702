//! Passes of items through a stream.

use std::thread;

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_offload::{Access, Depth, Item, Lane, Region, Store, Stream};
use proptest::prelude::*;

use crate::support::{folders, numbers, store, ways};

/// What every test's "update" does to the number `x` of lane `lane`.
fn updated(x: f32, lane: usize) -> f32 {
    x * 0.5 + lane as f32
}

fn read(store: &Store, region: &Region) -> Vec<f32> {
    let mut numbers = vec![f32::NAN; region.len()];
    store.read(region, SpanMut::from(&mut numbers[..])).unwrap();
    numbers
}

/// Regions of `lanes` lanes for each unit, filled with [`numbers`].
fn fill(store: &Store, units: &[usize], lanes: usize) -> Vec<Vec<Region>> {
    let mut seed = 0;
    units
        .iter()
        .map(|len| {
            (0..lanes)
                .map(|_| {
                    let region = store.allocate(*len, DType::F32).unwrap();
                    store.write(&region, Span::from(&numbers(*len, seed)[..])).unwrap();
                    seed += 1;
                    region
                })
                .collect()
        })
        .collect()
}

fn capacity(units: &[usize], lanes: usize) -> u64 {
    units.iter().map(|len| lanes as u64 * Store::bytes_of(*len, DType::F32)).sum()
}

/// Updates every item of a pass.
fn run(stream: &mut Stream, items: &[Item], lanes: usize) {
    let access = vec![Access::Update; lanes];
    let mut pass = stream.pass(items, &access).unwrap();
    let mut expected = items.iter();
    while let Some(mut loaded) = pass.load_next().unwrap() {
        assert_eq!(Some(loaded.item()), expected.next());
        let lens: Vec<usize> = loaded.item().regions.iter().map(Region::len).collect();
        for (lane, slice) in loaded.f32_slices().into_iter().enumerate() {
            assert_eq!(slice.len(), lens[lane]);
            slice.iter_mut().for_each(|x| *x = updated(*x, lane));
        }
        loaded.write_back().unwrap();
    }
    assert_eq!(expected.next(), None);
    let bytes: usize = items.iter().flat_map(|item| &item.regions).map(Region::padded_bytes).sum();
    let traffic = pass.finish().unwrap();
    assert_eq!((traffic.read_bytes, traffic.written_bytes), (bytes as u64, bytes as u64));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_pass_updates_every_number_once(
        units in prop::collection::vec(prop_oneof![0usize..9000, Just(2048), Just(4096)], 0..6),
        lanes in 1usize..4,
        piece in 1usize..6000,
        read_ahead in 0usize..4,
        write_behind in 0usize..4,
    ) {
        for folder in folders() {
            for options in ways() {
                let Some(store) = store(folder.path(), capacity(&units, lanes), &options) else { continue };
                let regions = fill(&store, &units, lanes);
                let items: Vec<Item> = regions
                    .iter()
                    .enumerate()
                    .flat_map(|(unit, regions)| Item::cut(unit, regions, piece))
                    .collect();
                let lane = Lane::f32(items.iter().map(Item::len).max().unwrap_or(0));
                let mut stream = Stream::new(&store, &vec![lane; lanes], Depth { read_ahead, write_behind });
                run(&mut stream, &items, lanes);
                run(&mut stream, &items, lanes);
                for (seed, region) in regions.iter().flatten().enumerate() {
                    let lane = seed % lanes;
                    let expected: Vec<f32> = numbers(region.len(), seed)
                        .into_iter()
                        .map(|x| updated(updated(x, lane), lane))
                        .collect();
                    prop_assert_eq!(read(&store, region), expected);
                }
            }
        }
    }
}

#[test]
fn each_lane_is_treated_as_its_access_says() {
    for folder in folders() {
        for options in ways() {
            let units = [3000, 0, 5000];
            let Some(store) = store(folder.path(), capacity(&units, 3), &options) else { continue };
            let regions = fill(&store, &units, 3);
            let items: Vec<Item> =
                regions.iter().enumerate().map(|(unit, regions)| Item::whole(unit, regions)).collect();
            let access = [Access::Read, Access::Update, Access::Overwrite];
            let mut stream = Stream::new(&store, &[Lane::f32(5000); 3], Depth::default());
            let mut pass = stream.pass(&items, &access).unwrap();
            while let Some(mut loaded) = pass.load_next().unwrap() {
                let [gradient, state, fresh] = loaded.f32_lanes();
                for i in 0..state.len() {
                    state[i] += gradient[i];
                    gradient[i] = -1.0;
                    fresh[i] = i as f32;
                }
                loaded.write_back().unwrap();
            }
            let traffic = pass.finish().unwrap();
            assert_eq!(traffic.read_bytes, traffic.written_bytes);

            for (unit, regions) in regions.iter().enumerate() {
                let (gradient, state) = (numbers(units[unit], 3 * unit), numbers(units[unit], 3 * unit + 1));
                let sum: Vec<f32> = state.iter().zip(&gradient).map(|(s, g)| s + g).collect();
                let fresh: Vec<f32> = (0..units[unit]).map(|i| i as f32).collect();
                assert_eq!(
                    [read(&store, &regions[0]), read(&store, &regions[1]), read(&store, &regions[2])],
                    [gradient, sum, fresh]
                );
            }
        }
    }
}

#[test]
fn an_item_that_is_not_written_back_keeps_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    for options in ways() {
        let Some(store) = store(folder.path(), capacity(&[2000; 3], 1), &options) else { continue };
        let regions = fill(&store, &[2000; 3], 1);
        let items: Vec<Item> = regions.iter().map(|regions| Item::whole(0, regions)).collect();
        let mut stream = Stream::new(&store, &[Lane::f32(2000)], Depth { read_ahead: 0, write_behind: 0 });
        let mut pass = stream.pass(&items, &[Access::Update]).unwrap();
        while let Some(mut loaded) = pass.load_next().unwrap() {
            loaded.f32_slices()[0].fill(f32::NAN);
        }
        assert_eq!(pass.finish().unwrap().written_bytes, 0);
        for (seed, regions) in regions.iter().enumerate() {
            assert_eq!(read(&store, &regions[0]), numbers(2000, seed));
        }
    }
}

#[test]
fn a_pass_dropped_in_the_middle_has_written_what_it_was_given_and_nothing_else() {
    for folder in folders() {
        for options in ways() {
            let units = [20_000; 8];
            let Some(store) = store(folder.path(), capacity(&units, 2), &options) else { continue };
            let regions = fill(&store, &units, 2);
            let items: Vec<Item> = regions.iter().map(|regions| Item::whole(0, regions)).collect();
            let mut stream =
                Stream::new(&store, &[Lane::f32(20_000); 2], Depth { read_ahead: 2, write_behind: 2 });

            // With reads ahead and writes behind in flight.
            let mut pass = stream.pass(&items, &[Access::Update; 2]).unwrap();
            for _ in 0..3 {
                let mut loaded = pass.load_next().unwrap().unwrap();
                loaded.f32_slices().into_iter().for_each(|slice| slice.fill(7.0));
                loaded.write_back().unwrap();
            }
            drop(pass);
            for (unit, regions) in regions.iter().enumerate() {
                for (lane, region) in regions.iter().enumerate() {
                    let expected =
                        if unit < 3 { vec![7.0; 20_000] } else { numbers(20_000, 2 * unit + lane) };
                    assert_eq!(read(&store, region), expected, "{options:?}");
                }
            }

            // The stream serves the next pass; then everything goes at once, with reads in flight.
            run(&mut stream, &items, 2);
            let pass = stream.pass(&items, &[Access::Update; 2]).unwrap();
            drop(store);
            drop(pass);
            drop(stream);
        }
    }
}

#[test]
fn streams_of_one_store_run_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    for options in ways() {
        let units = [10_000; 6];
        let Some(store) = store(folder.path(), 4 * capacity(&units, 1), &options) else { continue };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let regions = fill(&store, &units, 1);
                    let items: Vec<Item> = regions.iter().flat_map(|r| Item::cut(0, r, 3000)).collect();
                    let mut stream = Stream::new(&store, &[Lane::f32(3000)], Depth::default());
                    for _ in 0..3 {
                        run(&mut stream, &items, 1);
                    }
                    for (seed, regions) in regions.iter().enumerate() {
                        let expected: Vec<f32> =
                            numbers(10_000, seed).into_iter().map(|x| x * 0.125).collect();
                        assert_eq!(read(&store, &regions[0]), expected);
                    }
                });
            }
        });
    }
}

#[test]
fn a_stream_has_the_memory_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path(), 0, &ways()[0].clone()).unwrap();
    let lanes = [Lane::f32(1025), Lane { dtype: DType::BF16, len: 2048 }, Lane::f32(0)];
    let stream = Stream::new(&store, &lanes, Depth { read_ahead: 2, write_behind: 1 });
    assert_eq!(stream.buffer_bytes(), 4 * (8192 + 4096));
}

#[test]
fn items_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let options = &ways()[0];
    let Some(store) = store(folder.path(), capacity(&[5000, 5000], 1), options) else { return };
    let regions = [store.allocate(5000, DType::F32).unwrap(), store.allocate(5000, DType::F32).unwrap()];
    let mut stream = Stream::new(&store, &[Lane::f32(4096)], Depth::default());
    let mut refusal =
        |items: &[Item], access: &[Access]| stream.pass(items, access).map(drop).unwrap_err().to_string();

    assert_eq!(
        refusal(&[Item::whole(0, &regions[..1])], &[Access::Read]),
        "Stream::pass: region 0 of item 0 has 5000 fp32 elements, but its lane holds 4096 of fp32"
    );
    assert_eq!(refusal(&[], &[Access::Read; 2]), "Stream::pass: access for 2 lanes, but the stream has 1");
    assert_eq!(
        refusal(&[Item::whole(0, &regions)], &[Access::Read]),
        "Stream::pass: item 0 has 2 regions, but the stream has 1 lanes"
    );
    let piece = Item::whole(0, &[regions[1].slice(0, 2048)]);
    assert_eq!(
        refusal(&[piece.clone(), piece.clone()], &[Access::Update]),
        "Stream::pass: two regions overlap at byte 20480 of the store"
    );
    stream.pass(&[piece.clone(), piece], &[Access::Read]).unwrap().finish().unwrap();
    let other = Store::create(folder.path(), 4096, options).unwrap().allocate(1, DType::F32).unwrap();
    let mut stream = Stream::new(&store, &[Lane::f32(1)], Depth::default());
    assert_eq!(
        stream.pass(&[Item::whole(0, &[other])], &[Access::Read]).unwrap_err().to_string(),
        "Stream::pass: region 0 of item 0 belongs to another store"
    );
}
