//! The `deepspeed` command.
fn main() {}
