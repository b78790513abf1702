//! The extension module `deepspeed._native`.
