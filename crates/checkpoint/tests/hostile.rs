//! Bytes from outside, through the targets of `fuzz/`: the corpus, and mutations of it.
//!
//! `DEEPSPEED_FUZZ_SECONDS=600 cargo test -p deepspeed-checkpoint --test hostile` goes on for that long per target.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../../fuzz/src/lib.rs"]
#[allow(unreachable_pub, dead_code, reason = "the fuzz crate's own public functions")]
mod targets;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use targets::{TARGETS, Target, valid_input};

/// Mutations of each target in an ordinary test run.
const MUTATIONS: usize = 1500;
/// The most that a thread may allocate at once for an input of a few kilobytes: the buffers for reading have a megabyte.
const MAX_ALLOCATION: usize = 8 << 20;
/// The same for files of torch, where a tensor of up to 16 Mi elements may be a repeated view of a few.
const MAX_TORCH_ALLOCATION: usize = 160 << 20;
/// An input takes milliseconds; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Notes the largest allocation of each thread.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands everything on to the system's allocator and only looks at the sizes; the cell has no destructor and needs
// no memory, so that it can be used here.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

fn note(size: usize) {
    // A thread that ends has no cell any more, and allocates nothing of interest.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

/// The committed inputs of a target, by name.
fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<(String, Vec<u8>)> = fs::read_dir(corpus(target))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
        })
        .collect();
    found.sort();
    found
}

/// Runs one input; what is wrong, if anything is.
fn run(name: &str, target: Target, data: &[u8]) -> Result<(), String> {
    LARGEST.set(0);
    let began = Instant::now();
    panic::catch_unwind(AssertUnwindSafe(|| target(data))).map_err(|_| "it panics".to_owned())?;
    let largest = LARGEST.get();
    let torch = matches!(name, "pickle" | "torch_file");
    let most = if torch { MAX_TORCH_ALLOCATION } else { MAX_ALLOCATION };
    if largest > most + 16 * data.len() {
        return Err(format!("it allocates {largest} bytes at once"));
    }
    if began.elapsed() > PATIENCE {
        return Err(format!("it takes {:?}", began.elapsed()));
    }
    Ok(())
}

fn check(name: &str, target: Target, what: &str, data: &[u8]) {
    if let Err(problem) = run(name, target, data) {
        let path = std::env::temp_dir().join(format!("deepspeed-fuzz-{name}-{}", data.len()));
        fs::write(&path, data).unwrap();
        panic!("target {name}, {what}: {problem}; the input is {}", path.display());
    }
}

/// Numbers that look random and are the same in every run with the same seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// What programs that read numbers and names trip over.
const TOKENS: [&[u8]; 18] = [
    b"0",
    b"-1",
    b"1e999",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775807",
    b"4294967295",
    b"null",
    b"[]",
    b"{}",
    b"\"\"",
    b"..",
    b"/",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\0\0\0\0\0\0\0\0",
    b"[[[[[[[[",
    b"I64",
    b"\"w\"",
];

fn mutated(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = dice.pick(seeds).clone();
    for _ in 0..=dice.below(4) {
        let at = dice.below(data.len() + 1);
        match dice.below(8) {
            0 if at < data.len() => data[at] ^= 1 << dice.below(8),
            1 if at < data.len() => data[at] = dice.next() as u8,
            2 => data.truncate(at),
            3 => {
                let token = *dice.pick(&TOKENS);
                data.splice(at..at, token.iter().copied());
            }
            4 => replace_number(dice, &mut data, at),
            5 => {
                let end = (at + dice.below(64)).min(data.len());
                data.drain(at..end);
            }
            6 => {
                let end = (at + dice.below(64)).min(data.len());
                let part = data[at..end].to_vec();
                let to = dice.below(data.len() + 1);
                data.splice(to..to, part);
            }
            _ => {
                let other = dice.pick(seeds);
                let from = dice.below(other.len() + 1);
                let end = (from + dice.below(200)).min(other.len());
                data.splice(at..at, other[from..end].iter().copied());
            }
        }
    }
    data
}

/// Puts another number in the place of the next one in the text.
fn replace_number(dice: &mut Dice, data: &mut Vec<u8>, at: usize) {
    let digit = |byte: &u8| byte.is_ascii_digit();
    if let Some(start) = data[at..].iter().position(digit).map(|it| it + at) {
        let len = data[start..].iter().take_while(|byte| digit(byte)).count();
        let small = dice.below(20).to_string().into_bytes();
        let token = if dice.below(2) == 0 { small } else { dice.pick(&TOKENS[..7]).to_vec() };
        data.splice(start..start + len, token);
    }
}

#[test]
fn the_corpus_does_no_harm() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(inputs.len() >= 5, "{name} has a corpus");
        for (file, data) in inputs {
            check(name, target, &file, &data);
        }
    }
}

#[test]
fn mutations_do_no_harm() {
    let seconds = std::env::var("DEEPSPEED_FUZZ_SECONDS").ok().map(|text| text.parse::<u64>().unwrap());
    // Another sequence in every longer run.
    let seed = seconds.map_or(1, |_| u64::from(std::process::id()));
    let workers: Vec<_> = TARGETS
        .into_iter()
        .map(|(name, target)| {
            std::thread::spawn(move || {
                let mut dice = Dice(seed | 1);
                let mut seeds: Vec<Vec<u8>> = inputs(name).into_iter().map(|(_, data)| data).collect();
                let valid = valid_input(name);
                seeds.extend(vec![valid; seeds.len()]);
                let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
                let mut count = 0;
                while count < MUTATIONS || (seconds.is_some() && Instant::now() < until) {
                    let data = mutated(&mut dice, &seeds);
                    check(name, target, &format!("mutation {count} of seed {seed}"), &data);
                    count += 1;
                }
                count
            })
        })
        .collect();
    let counts: Vec<_> = workers.into_iter().map(std::thread::JoinHandle::join).collect();
    for (count, (name, _)) in counts.into_iter().zip(TARGETS) {
        match count {
            Ok(count) => println!("{name}: {count} mutations"),
            Err(problem) => panic!("{}", problem.downcast_ref::<String>().unwrap_or(&name.to_owned())),
        }
    }
}

#[test]
fn a_valid_input_is_read_to_its_end() {
    // A target that fails at the door would find nothing.
    for (name, target) in TARGETS {
        let data = valid_input(name);
        assert!(run(name, target, &data).is_ok(), "{name}");
    }
    let text = String::from_utf8(valid_input("manifest")).unwrap();
    assert!(text.contains("\"tied\""), "{text}");
}
