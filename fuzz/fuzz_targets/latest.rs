//! libFuzzer's door to the target `latest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::latest(data));
