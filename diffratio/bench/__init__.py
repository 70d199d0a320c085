"""The speed bench: every variant in one interleaved loop, on the same weights, against the dense model and peers."""
