"""The engine folder: manifest schema, builder, loader."""
