"""VeRA's arithmetic on tensors. Nothing here knows a module."""
