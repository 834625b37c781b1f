"""Training: what is trained, by which loss, and the one loop."""
