//! libFuzzer's door to the target `record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::record(data));
