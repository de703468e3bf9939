"""Kernel sources, their compiler, the registry, and one reference torch function per op."""
