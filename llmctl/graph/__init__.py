"""The model as data: ops over named buffers and weights, families, passes. Knows no device."""
