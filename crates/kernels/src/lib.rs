//! Loops over slices with SIMD chosen at run time: casts, sums, norms, optimizer updates.
