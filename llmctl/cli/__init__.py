"""Typer application: one file per subcommand; parses options, builds a config, makes one call."""
