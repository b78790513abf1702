//! ZeRO: units, shards, what is resident when; reduction and publication of shards.
