//! libFuzzer's door to the target `resources`.
#![no_main]

#[path = "../src/resources.rs"]
mod resources;

libfuzzer_sys::fuzz_target!(|data: &[u8]| resources::resources(data));
