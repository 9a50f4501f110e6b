"""The training engine. It asks a method what it needs and never which one it is."""
