"""Quantization algorithms as pure functions, calibration, and the layer-by-layer driver."""
