"""With samples: what each layer sees, and what an error in it does to the outputs."""
