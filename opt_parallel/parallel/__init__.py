"""Layers split over a tensor group, and what they stand on: marks, collectives, chance."""
