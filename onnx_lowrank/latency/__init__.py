"""What candidates take: measured in the network, on an engine, or on a device by a bundle; and what a plan makes of it."""
