//! Resources, filters, the launch plan, and the supervision of ranks.
