//! libFuzzer's door to the target `pickle`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::pickle(data));
