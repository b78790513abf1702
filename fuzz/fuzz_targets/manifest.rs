//! libFuzzer's door to the target `manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::manifest(data));
