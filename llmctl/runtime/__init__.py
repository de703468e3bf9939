"""Interpreters of a Graph, one per device, behind one small protocol."""
