"""Tables and pictures, made from run folders and never typed."""
