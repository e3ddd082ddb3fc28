"""Plans made, carried out and measured in turn, until what was asked for holds."""
