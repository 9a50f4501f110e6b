"""The commands, one file each; none imports torch before its arguments are read."""
