//! How far a long operation has come, for those who show it.

/// Is told of the bytes an operation will pass through, and of those it has. Called from any thread.
pub trait Progress: Sync {
    /// The operation, or its next part, has `bytes` ahead of it; `what` it is, as `writing model.safetensors`.
    fn begin(&self, what: &str, bytes: u64);

    /// It has done `bytes` more.
    fn advance(&self, bytes: u64);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _what: &str, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}
}
