"""VeRA's arithmetic on tensors, independent of modules."""
