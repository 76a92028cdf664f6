"""The frozen random matrices A and B: how they are drawn and stored."""
