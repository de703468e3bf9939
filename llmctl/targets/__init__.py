"""Build and run a Graph on one device each: a room a target, and what they share."""
