"""Process groups, and layers whose weights are split over a tensor-parallel group."""
