"""The interactive page: a video that grows while people watch it, steer it and see what it remembers."""
