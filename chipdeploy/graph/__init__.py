"""What a network's channels are, how they hang together, and how they are cut."""
