//! The command line: the launcher's own, and the part of it that tools on several hosts share.

pub(crate) mod args;
pub(crate) mod host_args;
