"""What ``parity.py`` is made of: the tools and kinds of checkpoints, their environments, comparisons and the report."""
