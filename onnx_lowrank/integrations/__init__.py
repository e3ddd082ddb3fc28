"""The tools that this one plugs into, a module for each."""
