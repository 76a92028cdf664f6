"""What the other packages share: files, torch internals, sharding, timing."""
