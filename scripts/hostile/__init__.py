"""What ``scripts/soak.py --hostile`` is made of: attacks on a server, and what must hold meanwhile and afterwards."""
