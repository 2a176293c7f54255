"""What goes wrong with GANs and their norms, measured while they train."""
