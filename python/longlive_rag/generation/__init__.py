"""From noise to a long video: the few-step sampler, the roll-out and video files."""
