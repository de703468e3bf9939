"""The servers that ``bench_peers.py`` measures: how each is installed, given its model and started."""
