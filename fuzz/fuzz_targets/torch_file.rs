//! libFuzzer's door to the target `torch_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deepspeed_fuzz::torch_file(data));
