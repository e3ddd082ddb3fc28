"""From layers to a plan: candidates solved for, held to a target, read and written as JSON."""
