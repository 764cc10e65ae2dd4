"""Small experiments on a CPU: what a layer does for training or testing, with seeds."""
