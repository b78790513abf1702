//! Command lines, hostfiles and environment files of any kind, through the target of `fuzz/`: the corpus, and mutations of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/src/resources.rs"]
#[allow(unreachable_pub, reason = "the fuzz crate's own public functions")]
mod target;

use proptest::prelude::*;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

/// What parsers of names and numbers trip over.
const TOKENS: [&str; 16] = [
    "0",
    "-1",
    "4096",
    "4097",
    "99999999999999999999",
    "slots=",
    "slots=1",
    ":",
    "@",
    ",",
    "=",
    "\n",
    "\t",
    "é",
    "--num_gpus=3",
    "#",
];

fn corpus() -> &'static [Vec<u8>] {
    static CORPUS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    CORPUS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/resources");
        let mut inputs: Vec<Vec<u8>> =
            fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        inputs.sort();
        inputs
    })
}

#[test]
fn the_corpus_is_survived() {
    assert!(corpus().len() > 10);
    for input in corpus() {
        target::resources(input);
    }
}

proptest! {
    #[test]
    fn mutations_of_the_corpus_are_survived(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4, 0..TOKENS.len(), any::<u8>()), 1..6),
    ) {
        let mut input = which.get(corpus()).clone();
        for (at, kind, token, byte) in changes {
            let at = at.index(input.len() + 1);
            match kind {
                0 => drop(input.splice(at..at, TOKENS[token].bytes())),
                1 if at < input.len() => input[at] = byte,
                2 if at < input.len() => drop(input.remove(at)),
                _ => input.truncate(at.max(1)),
            }
        }
        target::resources(&input);
    }
}
