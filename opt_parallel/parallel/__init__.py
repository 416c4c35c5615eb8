"""Process groups, layers split over a tensor group, and what these use: marks, collectives, random numbers."""
