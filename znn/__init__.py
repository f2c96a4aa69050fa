"""ZNN: train 2D and 3D ConvNets on CPUs as a graph of tasks, and measure how fast that is."""
