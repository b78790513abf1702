//! libFuzzer's door to the target `header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::header(data));
