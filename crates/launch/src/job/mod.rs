//! A job from its first attempt to its exit code: what is checked before it starts, the loop of attempts, the ranks of one host watched over.
//! Several hosts are in [`crate::hosts`].

pub(crate) mod attempts;
pub(crate) mod inbox;
pub(crate) mod pid_file;
pub(crate) mod preflight;
pub(crate) mod restart;
pub(crate) mod supervise;
