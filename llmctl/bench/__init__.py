"""Workloads, load generator, statistics, reports and the gate."""
