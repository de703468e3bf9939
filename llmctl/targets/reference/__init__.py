"""The reference target: plain torch, op by op. The oracle in tests, and the fall-back on any device."""
