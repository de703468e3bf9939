"""What ``try_clients.py`` is made of: the table of clients, their environments and runs, and what is said of them."""
