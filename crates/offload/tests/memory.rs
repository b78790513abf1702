//! A pass has no more memory than the buffers of its stream. A process of its own, so that nothing else is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use deepspeed_core::{DType, Span};
use deepspeed_offload::{Access, Depth, EngineChoice, Item, Lane, Options, Store, Stream};
use fs_err as fs;

/// The process's memory that is not files, bytes.
fn anonymous_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_pass_stays_within_its_buffers() {
    const LEN: usize = 16 << 20;
    const PIECE: usize = 256 << 10;
    /// Stacks and heap pages of the threads.
    const SLACK: usize = 3 << 20;
    /// What plain reads and writes copy through.
    const CHUNKS: usize = 16 << 20;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        let options = Options { engine, ..Options::default() };
        let store = Store::create(folder.path(), 3 * Store::bytes_of(LEN, DType::F32), &options).unwrap();
        let regions = [(); 3].map(|()| store.allocate(LEN, DType::F32).unwrap());
        let items: Vec<Item> = Item::cut(0, &regions, PIECE).collect();

        let before = anonymous_memory();
        let mut stream =
            Stream::new(&store, &[Lane::f32(PIECE); 3], Depth { read_ahead: 1, write_behind: 2 });
        assert_eq!(stream.buffer_bytes(), 4 * 3 * 4 * PIECE);
        let mut peak = 0;
        let mut pass = stream.pass(&items, &[Access::Update; 3]).unwrap();
        while let Some(mut loaded) = pass.load_next().unwrap() {
            loaded.f32_slices().into_iter().flatten().for_each(|x| *x += 1.0);
            loaded.write_back().unwrap();
            peak = peak.max(anonymous_memory());
        }
        pass.finish().unwrap();
        let used = peak.saturating_sub(before);
        assert!(
            used <= stream.buffer_bytes() + SLACK,
            "{used} bytes for {} of buffers",
            stream.buffer_bytes()
        );
        drop(stream);

        // Writing a whole region copies through a few chunks, not through all of it.
        let numbers = vec![1f32; LEN];
        let before = anonymous_memory();
        let (peak, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    peak.fetch_max(anonymous_memory(), Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
            });
            store.write(&regions[0], Span::from(&numbers[..])).unwrap();
            done.store(true, Relaxed);
        });
        let used = peak.load(Relaxed).saturating_sub(before);
        assert!(used <= CHUNKS + SLACK, "{used} bytes for a write of {} bytes", 4 * LEN);
    }
}
