//! Optimizers, learning-rate schedules and loss scaling: policy over kernels.
