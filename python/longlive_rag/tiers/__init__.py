"""Where keys and values lie when they do not lie on the device, and how they come and go."""

Entry = tuple[int, int]
"""A video and one of its latent frames."""
