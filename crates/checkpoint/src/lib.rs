//! The on-disk format: named slices, manifest, atomic commit.
