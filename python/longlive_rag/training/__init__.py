"""From a frozen generator to a retrieval encoder: latent corpus, losses, trainer."""
